"""What the bot remembers: which Kiro session a topic has, and which messages it has taken on.

One SQLite file, one connection, one lock: every method may be called from any thread, holds the lock for one short
transaction, and has committed when it returns.  Every failure of the database is a `StoreError`.

Two parts share the file:

* **sessions**: one row for each (user, thread), the owner's data model.
* **inbox**: the journal.  A message is written here before Telegram is told that it was received.  Messages that go to
  Kiro as one prompt share a *turn* and change their state together:

      told -> waiting -> begun -> answered -> done
                           |          |
                           +----------+-> offered -> waiting again, or done

  *told* is what `bot.py --tell` has put there; the bot that polls makes it wait.  Messages that Telegram did not send have
  negative update_ids.

  *begun* is committed just before the prompt is sent, *answered* together with the parts of the answer before the first
  of them is sent; a part is deleted when Telegram has confirmed it.  *offered* turns were cut off: the topic has buttons
  to ask again or to drop them.

Glossary: *user* is a Telegram user id, *thread* a Telegram message_thread_id (0 outside any topic), *body* a JSON text
that this module does not look into, *position* a part's place in its answer.
"""

import logging
import os
import sqlite3
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, Iterable, Iterator, NamedTuple, Optional

log = logging.getLogger("sessions")

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    user_id        INTEGER NOT NULL,
    thread_id      INTEGER NOT NULL,
    session_id     TEXT    NOT NULL,
    workspace_path TEXT    NOT NULL,
    model          TEXT    NOT NULL DEFAULT 'auto',
    created_at     TEXT    NOT NULL,     -- ISO 8601 UTC, first creation; survives an upsert
    updated_at     TEXT    NOT NULL,     -- ISO 8601 UTC, last upsert
    PRIMARY KEY (user_id, thread_id)
);
CREATE TABLE IF NOT EXISTS notes (                -- what the bot has found out; of a session: which facts hold, or 'new'
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS used_sessions (        -- the last ten of each thread, the present one among them
    user_id    INTEGER NOT NULL,
    thread_id  INTEGER NOT NULL,
    session_id TEXT    NOT NULL,
    folder     TEXT    NOT NULL,
    title      TEXT    NOT NULL,             -- the first words said in it
    used_at    TEXT    NOT NULL,
    PRIMARY KEY (user_id, thread_id, session_id)
);
"""
JOURNAL = """
CREATE TABLE IF NOT EXISTS inbox (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,   -- order of arrival
    update_id  INTEGER NOT NULL UNIQUE,
    user_id    INTEGER NOT NULL,
    thread_id  INTEGER NOT NULL,
    message_id INTEGER NOT NULL,
    body       TEXT    NOT NULL,                    -- the update as JSON
    state      TEXT    NOT NULL DEFAULT 'waiting',
    turn_id    INTEGER,
    changed_at TEXT    NOT NULL
);
CREATE INDEX IF NOT EXISTS inbox_by_turn ON inbox (turn_id);
CREATE INDEX IF NOT EXISTS inbox_by_state ON inbox (state);
CREATE TABLE IF NOT EXISTS turns (
    turn_id   INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id   INTEGER NOT NULL,
    thread_id INTEGER NOT NULL,
    partial   TEXT    NOT NULL DEFAULT '',          -- what Kiro had said when the bot was stopped
    offer     INTEGER NOT NULL DEFAULT 0            -- once sent, it is offered rather than done
);
CREATE TABLE IF NOT EXISTS parts (
    turn_id  INTEGER NOT NULL,
    position INTEGER NOT NULL,
    body     TEXT    NOT NULL,
    PRIMARY KEY (turn_id, position)
);
"""
IS_OURS = "SELECT session_id, workspace_path, model, update_id, state, turn_id FROM sessions, inbox LIMIT 0"
GET_SESSION = "SELECT user_id, thread_id, session_id, workspace_path, model FROM sessions WHERE user_id = ? AND thread_id = ?"
UPSERT_SESSION = """
INSERT INTO sessions (user_id, thread_id, session_id, workspace_path, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (user_id, thread_id) DO UPDATE SET
    session_id = excluded.session_id, workspace_path = excluded.workspace_path, updated_at = excluded.updated_at
"""
SET_MODEL = "UPDATE sessions SET model = ? WHERE user_id = ? AND thread_id = ?"
CHOSEN = "chosen {}/{}"          # the note that somebody chose a thread's model, maybe 'auto'
DELETE_SESSION = "DELETE FROM sessions WHERE user_id = ? AND thread_id = ?"
SESSION_IDS = "SELECT session_id FROM sessions"

NOTE_USED = """
INSERT INTO used_sessions SELECT user_id, thread_id, session_id, workspace_path, ?, ?
FROM sessions LEFT JOIN notes ON name = 'session ' || session_id
WHERE user_id = ? AND thread_id = ? AND coalesce(value, 'ended') LIKE 'ended%'
ON CONFLICT DO UPDATE SET used_at = excluded.used_at, title = coalesce(nullif(title, ''), excluded.title)
"""
OF_THREAD = " FROM used_sessions WHERE user_id = ? AND thread_id = ? ORDER BY used_at DESC"
USED = "SELECT session_id, folder, coalesce(nullif(title, ''), session_id), used_at" + OF_THREAD
PURGE_USED = "DELETE FROM used_sessions WHERE rowid IN (SELECT rowid" + OF_THREAD + " LIMIT -1 OFFSET 10)"
OWNER = """
SELECT user_id, coalesce(title, '') FROM sessions LEFT JOIN used_sessions USING (user_id, thread_id, session_id)
WHERE session_id = ?
"""

GET_NOTE = "SELECT value FROM notes WHERE name = ?"
SET_NOTE = "INSERT INTO notes VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value WHERE value != excluded.value"
NEW_SESSION = "INSERT OR IGNORE INTO notes VALUES ('session ' || ?, 'new')"
PURGE_NOTES = "DELETE FROM notes WHERE name LIKE 'session %' AND substr(name, 9) NOT IN (SELECT session_id FROM sessions)"

RECEIVE = "INSERT OR IGNORE INTO inbox (update_id, user_id, thread_id, message_id, body, changed_at) VALUES (?, ?, ?, ?, ?, ?)"
RECEIVE_OWN = """
INSERT INTO inbox (update_id, user_id, thread_id, message_id, body, state, changed_at)
SELECT min(0, coalesce(min(update_id), 0)) - 1, ?, ?, 0, ?, ?, ? FROM inbox
"""
EDIT = "UPDATE inbox SET body = ? WHERE user_id = ? AND message_id = ?"
FIND_MESSAGE = "SELECT body, state FROM inbox WHERE user_id = ? AND message_id = ?"
MESSAGES = "SELECT update_id, user_id, thread_id, message_id, body FROM inbox"
BY_ID = MESSAGES + " WHERE id = ?"
TOLD = MESSAGES + " WHERE state = 'told' ORDER BY id"
TAKE_TOLD = "UPDATE inbox SET state = 'waiting' WHERE state = 'told'"
COUNT_TOLD = "SELECT count(*) FROM inbox WHERE user_id = ? AND thread_id = ? AND update_id < 0 AND state IN ('told', 'waiting')"
WAITING = MESSAGES + " WHERE state = 'waiting' ORDER BY id"
OF_TURN = MESSAGES + " WHERE turn_id = ? ORDER BY id"
NEW_TURN = "INSERT INTO turns (user_id, thread_id) VALUES (?, ?)"
JOIN_TURN = "UPDATE inbox SET turn_id = ?, state = 'begun', changed_at = ? WHERE update_id = ?"
TURN_STATE = "UPDATE inbox SET state = ?, changed_at = ? WHERE turn_id = ?"
MESSAGE_DONE = "UPDATE inbox SET state = 'done', changed_at = ? WHERE update_id = ?"
UNFINISHED = """
SELECT turn_id, turns.user_id, turns.thread_id, state, partial, offer FROM turns JOIN inbox USING (turn_id)
WHERE state IN ('begun', 'answered') GROUP BY turn_id ORDER BY turn_id
"""
KEEP_PARTIAL = "UPDATE turns SET partial = ? WHERE turn_id = ?"
SET_OFFER = "UPDATE turns SET offer = ? WHERE turn_id = ?"
ADD_PART = "INSERT INTO parts (turn_id, position, body) VALUES (?, ?, ?)"
PARTS = "SELECT body FROM parts WHERE turn_id = ? ORDER BY position"
DELETE_PARTS = "DELETE FROM parts WHERE turn_id = ?"
TAKE_OUT = """
UPDATE inbox SET state = ?, turn_id = NULL, changed_at = ?
WHERE turn_id = ? AND user_id = ? AND state IN ('begun', 'answered', 'offered')
"""
PURGE_INBOX = "DELETE FROM inbox WHERE state = 'done' AND changed_at < ?"
PURGE_TURNS = "DELETE FROM turns WHERE turn_id NOT IN (SELECT turn_id FROM inbox WHERE turn_id IS NOT NULL)"
PURGE_PARTS = "DELETE FROM parts WHERE turn_id NOT IN (SELECT turn_id FROM turns)"

KEEP_DONE = timedelta(days=2)   # Telegram redelivers an update for 24 hours at most
CLOSE_SECONDS = 0.1             # how long to wait for a transaction that waits for such a process
BUSY_SECONDS = 10               # how long to wait for another process (the console, a backup) to let go of the file


class StoreError(Exception):
    """The database could not be read or written; the text says why, in SQLite's words."""


class SessionRecord(NamedTuple):
    """A topic's session, as the table has it."""
    user_id: int              # Telegram user
    thread_id: int            # Telegram message_thread_id, 0 outside any topic
    session_id: str           # Kiro's, from session/new
    workspace_path: str       # absolute
    model: str = "auto"


class SessionFacts(NamedTuple):
    """What is known of a session."""
    ended: bool               # a turn of it has ended, so that it has a history to lose
    taught: bool              # Kiro knows the bot's tags in it
    in_sight: bool            # Kiro's file of it was in sight when its last turn ended


class InboxMessage(NamedTuple):
    """A message as the journal has it."""
    update_id: int            # Telegram's
    user_id: int
    thread_id: int
    message_id: int           # Telegram's, within the chat
    body: str                 # the update as JSON


class UnfinishedTurn(NamedTuple):
    """A turn that a former run of the bot has left behind."""
    turn_id: int
    user_id: int
    thread_id: int
    state: str                # "begun" or "answered"
    partial: str              # what Kiro had said, if that was kept
    offer: bool               # once sent, it is offered again


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat()


class SessionStore:
    """The database file at `db_path`, made when it is missing; a context manager.  With `journal="TEMP TABLE"` messages, turns and
    parts are nobody else's, and end with it.  Raises StoreError."""

    def __init__(self, db_path: str, journal: str = "TABLE") -> None:
        self._lock = threading.Lock()   # held for one transaction
        self._path = db_path
        self._schema = SCHEMA + JOURNAL.replace("TABLE", journal)
        self._open()

    def _open(self) -> None:
        """Connect to the file, and make what is missing."""
        self._inode: Optional[int] = -1         # until it is open
        try:
            self._connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, check_same_thread=False)
            self._connection.executescript(self._schema)
            self._connection.execute(IS_OURS)       # somebody else's tables are refused here
            self._inode = _inode(self._path)
        except sqlite3.Error as error:
            raise StoreError(f"The database {self._path} can't be used: {error}") from error

    def __enter__(self) -> "SessionStore":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless somebody is waiting for it.  Later calls raise StoreError."""
        if self._lock.acquire(timeout=CLOSE_SECONDS):
            self._path = ":memory:"     # so that it is not opened again
            self._inode = None
            self._connection.close()
            self._lock.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The one place that touches the connection: all of the block is committed, or none."""
        with self._lock:
            if _inode(self._path) != self._inode:
                log.warning("The database %s was replaced or deleted: opening it anew", self._path)
                self._connection.close()
                self._open()
            try:
                with self._connection:
                    yield self._connection
            except (sqlite3.Error, OverflowError, UnicodeError) as error:
                raise StoreError(str(error)) from error

    def _execute(self, query: str, *values: Any) -> list[tuple]:
        """Run one statement as a transaction; return its rows."""
        with self._transaction() as db:
            return db.execute(query, values).fetchall()

    def _messages(self, query: str, *values: Any) -> list[InboxMessage]:
        return [InboxMessage(*row) for row in self._execute(query, *values)]

    # -- sessions ------------------------------------------------------------------------------------------------------

    def get_session(self, user_id: int, thread_id: int) -> Optional[SessionRecord]:
        """Return the thread's session, or None."""
        return next((SessionRecord(*row) for row in self._execute(GET_SESSION, user_id, thread_id)), None)

    def upsert_session(self, user_id: int, thread_id: int, session_id: str, workspace_path: str,
                       keep_model: bool = False) -> None:
        """Give the thread this session; a new session starts at model `auto`, unless the thread's model is to be kept."""
        now = utc_now()
        with self._transaction() as db:
            db.execute(NOTE_USED, ("", now, user_id, thread_id))
            db.execute(UPSERT_SESSION, (user_id, thread_id, session_id, workspace_path, now, now))
            if not keep_model:
                _set_model(db, user_id, thread_id, "auto", "")
            db.execute(NEW_SESSION, (session_id,))

    def set_model(self, user_id: int, thread_id: int, model: str, is_chosen: bool = True) -> None:
        """Choose the thread's model, or note that nobody's choice holds any more; nothing happens without a row."""
        with self._transaction() as db:
            _set_model(db, user_id, thread_id, model, "yes" if is_chosen else "")

    def chosen_model(self, user_id: int, thread_id: int) -> Optional[str]:
        """Return the thread's model if somebody chose it, else None: Kiro's own configuration says then which."""
        model = self.get_model(user_id, thread_id)
        return model if model != "auto" or self.get_note(CHOSEN.format(user_id, thread_id)) else None

    def get_model(self, user_id: int, thread_id: int) -> str:
        """Return the thread's model, `auto` without a row."""
        record = self.get_session(user_id, thread_id)
        return record.model if record else "auto"

    def delete_session(self, user_id: int, thread_id: int) -> None:
        """Forget the thread's session."""
        self._execute(DELETE_SESSION, user_id, thread_id)

    def session_ids(self) -> list[str]:
        """Return Kiro's ids of all sessions."""
        return [session_id for session_id, in self._execute(SESSION_IDS)]

    def note_used(self, user_id: int, thread_id: int, title: str) -> None:
        """Remember that the thread's session was used; its first title stays."""
        with self._transaction() as db:
            db.execute(NOTE_USED, (title, utc_now(), user_id, thread_id))
            db.execute(PURGE_USED, (user_id, thread_id))

    def used_sessions(self, user_id: int, thread_id: int) -> list[tuple[str, str, str, str]]:
        """Return (session_id, folder, title, used_at) of what the thread used, the last first."""
        return self._execute(USED, user_id, thread_id)

    def owner(self, session_id: str) -> Optional[tuple[int, str]]:
        """Return (user, title) of the thread that has this session now, or None."""
        return next(iter(self._execute(OWNER, session_id)), None)

    def get_facts(self, session_id: str) -> SessionFacts:
        """Return what is known of a session; one that an earlier version made may well have a history."""
        holds = (self.get_note(f"session {session_id}") or "ended").split()
        return SessionFacts(*(fact in holds for fact in SessionFacts._fields))

    def set_facts(self, session_id: str, **facts: bool) -> None:
        """Remember that these facts hold, or do not; the others stay as they are."""
        known = self.get_facts(session_id)._replace(**facts)._asdict()
        self.set_note(f"session {session_id}", " ".join(filter(known.get, known)) or "new")

    def get_note(self, name: str) -> str:
        """Return what was noted under this name, or nothing."""
        return "".join(value for value, in self._execute(GET_NOTE, name))

    def set_note(self, name: str, value: str) -> None:
        """Note something that the bot has found out."""
        self._execute(SET_NOTE, name, value)

    # -- inbox ---------------------------------------------------------------------------------------------------------

    def receive(self, messages: Iterable[InboxMessage], edits: Iterable[InboxMessage] = ()) -> set[int]:
        """Journal a batch in one transaction; return the update_ids that were not known before.

        An edit replaces the body of its message, whether that still waits or not.
        """
        now = utc_now()
        with self._transaction() as db:
            new = {message.update_id for message in messages if db.execute(RECEIVE, (*message, now)).rowcount}
            db.executemany(EDIT, [(edit.body, edit.user_id, edit.message_id) for edit in edits])
        return new

    def receive_own(self, user_id: int, thread_id: int, body: str, state: str = "waiting") -> InboxMessage:
        """Journal a message that Telegram did not send; return it."""
        with self._transaction() as db:
            row_id = db.execute(RECEIVE_OWN, (user_id, thread_id, body, state, utc_now())).lastrowid
            return InboxMessage(*db.execute(BY_ID, (row_id,)).fetchone())

    def take_told(self) -> list[InboxMessage]:
        """Make what was told wait, and return it, in order of arrival."""
        with self._transaction() as db:
            messages = [InboxMessage(*row) for row in db.execute(TOLD)]
            if messages:
                db.execute(TAKE_TOLD)
        return messages

    def count_told(self, user_id: int, thread_id: int) -> int:
        """Return how many messages that Telegram did not send wait in a topic."""
        return self._execute(COUNT_TOLD, user_id, thread_id)[0][0]

    def find_message(self, user_id: int, message_id: int) -> tuple[str, str]:
        """Return (body, state) of a message, two empty strings when it is not known."""
        return next(iter(self._execute(FIND_MESSAGE, user_id, message_id)), ("", ""))

    def waiting(self) -> list[InboxMessage]:
        """Return the messages that no turn has begun, in order of arrival."""
        return self._messages(WAITING)

    def messages_of(self, turn_id: int) -> list[InboxMessage]:
        """Return the messages of a turn, in order of arrival."""
        return self._messages(OF_TURN, turn_id)

    def done(self, update_id: int) -> None:
        """A message that needed no turn has been answered."""
        self._execute(MESSAGE_DONE, utc_now(), update_id)

    def begin(self, user_id: int, thread_id: int, update_ids: Iterable[int]) -> int:
        """Open a turn with these messages; return its turn_id."""
        with self._transaction() as db:
            turn_id = db.execute(NEW_TURN, (user_id, thread_id)).lastrowid
            db.executemany(JOIN_TURN, [(turn_id, utc_now(), update_id) for update_id in update_ids])
        return turn_id

    def keep_partial(self, turn_id: int, text: str) -> None:
        """Keep what Kiro has said so far in a turn that is being cut off."""
        self._execute(KEEP_PARTIAL, text, turn_id)

    def answer(self, turn_id: int, bodies: Iterable[str], offer: bool = False) -> None:
        """The turn has ended, and these parts are what is still to be sent of its answer; with `offer` it can be asked again
        once they are."""
        with self._transaction() as db:
            db.execute(DELETE_PARTS, (turn_id,))
            db.executemany(ADD_PART, [(turn_id, position, body) for position, body in enumerate(bodies)])
            db.execute(SET_OFFER, (offer, turn_id))
            db.execute(TURN_STATE, ("answered", utc_now(), turn_id))

    def parts(self, turn_id: int) -> list[str]:
        """Return the parts that Telegram has not confirmed, in order."""
        return [body for body, in self._execute(PARTS, turn_id)]

    def finish(self, turn_id: int, offer: bool = False) -> None:
        """All parts of the answer are sent: the turn is done, or with `offer` the topic has the buttons to ask it again."""
        self._execute(TURN_STATE, "offered" if offer else "done", utc_now(), turn_id)

    def drop(self, turn_id: int, user_id: int, then: str = "done") -> list[InboxMessage]:
        """Give a user's offered turn up; return its messages, none when there was nothing to give up."""
        with self._transaction() as db:
            messages = [InboxMessage(*row) for row in db.execute(OF_TURN, (turn_id,))]
            return messages if db.execute(TAKE_OUT, (then, utc_now(), turn_id, user_id)).rowcount else []

    def unfinished(self) -> list[UnfinishedTurn]:
        """Return the turns that are begun or answered, oldest first."""
        return [UnfinishedTurn(*row) for row in self._execute(UNFINISHED)]

    def purge(self) -> None:
        """Forget what was done two days ago, and what belongs to nothing any more."""
        old = (datetime.now(timezone.utc) - KEEP_DONE).isoformat()
        with self._transaction() as db:
            db.execute(PURGE_INBOX, (old,))
            for query in (PURGE_TURNS, PURGE_PARTS, PURGE_NOTES):
                db.execute(query)


def _set_model(db: sqlite3.Connection, user_id: int, thread_id: int, model: str, chosen: str) -> None:
    if db.execute(SET_MODEL, (model, user_id, thread_id)).rowcount:
        db.execute(SET_NOTE, (CHOSEN.format(user_id, thread_id), chosen))


def _inode(path: str) -> Optional[int]:
    """Return what tells a file from another that takes its place, None for none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None
