"""A Telegram bot that gives every topic of a private chat its own Kiro CLI session.

    python bot.py              serve Telegram until SIGINT or SIGTERM
    python bot.py --check      try everything once, say what was found, exit 0 or 1
    python bot.py --console    talk to Kiro in this terminal, through the same conversation code
    python bot.py --tell USER/THREAD [TEXT]    leave a message for a topic: for cron, CI, a build that has finished

After the settings, a message travels through this file from top to bottom:

    Poll           one long-poll loop; it parses, asks the gate, journals, hands over, and waits for nobody
    The bot        what all parts share: the table of conversations, errands, the orderly stop
    Commands       what the bot answers itself: /status, /model, presses of buttons
    Conversation   one per (user, thread): what waits, its thread, what comes next
    Turn           one run, from messages to an outcome, and the questions that Kiro asks meanwhile
    Prompt         what a message says to Kiro, with its quotes and files
    Agent          a topic's hold on Kiro: a place, a process, the topic's session and model
    Kiro           one child process speaking ACP on stdio, and the locks on its sessions
    Answer         what Kiro says: the draft, and the parts that stay
    Reply          the one door to Telegram, a chat's pace, a topic
    Text           how much there is of it, and what may be shown
    Markdown       what Kiro writes, made safe and cut to size
    Running        start, stop, the console, the check

Glossary.  *chat*: a private chat; its id is the user's id.  *thread*: a topic's message_thread_id, 0 outside any topic.
*conversation*: what belongs to one (user, thread).  *session*: Kiro's memory of it.  *turn*: from taking messages to the
answer's last part; its phases are at `Phase`.  *draft*: Telegram's streamed preview; a *frame* is one version of it.
*part*: one lasting message of an answer.  *place*: the right to have one Kiro process, of which there are MAX_PROCESSES.
*warm*: a process that is ready and waits for its message.  *card*: the message that offers an interrupted turn with **Ask
again** and **Drop**.  *errand*: something short that talks to Telegram.  *job*: what takes its place in the queue and is no
prompt, such as /new.

Threads.  main: starts, then waits for a signal, and every half second gives a sign of life to the kernel, which ends a
program that something has frozen.  poll: says what was found at the start, then `Poll.run`; it waits for Telegram's
getUpdates (and deleteWebhook after a 409) and the database, nothing else.  errands: one for each topic that has commands or
presses to be answered, while it has, and one for each file that is downloaded.  conversation: one for each conversation that
has work or a warm process; it alone calls Kiro and sends drafts and answers.  keeper: one for each Kiro process; it reads,
writes, sees the process and what that leaves behind to their end, and gives its place back.  last words: one at the stop,
notes what Kiro has said so far.

Locks, each held for a moment and never across a network call or a turn: `Conversation.lock` (what waits, the turn and its
phase, whether there is a thread), `Questions._lock`, `Places._lock`, `Pace._lock`, `Bot._lock` (the table of conversations),
`Bot.spawning` (no process starts unseen while the bot closes), and the database's own.  What is sent to Kiro is handed to its
keeper by adding to a buffer, which is one step.  Read without a lock, each a single value that is replaced as a whole:
`Bot.settings`, `Agent.models`, `commands` and `known`, `Kiro.turn_open`, `Telegram.rich`, `drafts` and `styles`,
`Draft.stopped`, `Delivery.sending` and `tries`, `Conversation.changes`; is there anything in `Delivery.held`; for /status,
what `Turn` and `Answer` tell; and what Kiro has said so far, when the bot stops.

Facts about Kiro and Telegram that the code relies on are marked [acp N] and [tg N]: section N of kiro-acp.md and of
telegram.md, the developers' notes on kiro-cli's ACP mode and on the Bot API, which name their sources.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # CPython keeps the syntax tree of the file that it runs for as long as it runs, 8 MB here; a module's it does not.
    AS_MODULE = "import os, sys; sys.path[0] = os.path.dirname(sys.argv[1]); import bot; bot.start(sys.argv[2:])"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", "-c", AS_MODULE, os.path.realpath(__file__), *sys.argv[1:]])

import argparse
import base64
import difflib
import errno
import faulthandler
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import mimetypes
import queue
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import termios
import threading
import time
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import Future
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import IO, Any, Callable, Generator, Iterable, Iterator, NamedTuple, Optional
from urllib.parse import unquote

try:
    import requests
    import telebot
    import urllib3
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream
    from telebot import apihelper, types, util
    from telebot.version import __version__ as telebot_version
except ModuleNotFoundError as error:
    INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python bot.py"
    print(f"bot.py: {error.name} is not installed. In the bot's folder: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

from sessions import InboxMessage, SessionFacts, SessionRecord, SessionStore, StoreError, UnfinishedTurn

log = logging.getLogger("bot")

DATABASE = "tg-acp.db"


# ======================================================================================================================
# Settings
# ======================================================================================================================

TELEGRAM_API = "https://api.telegram.org"
DEFAULTS = {"BOT_TOKEN": "",
            "ALLOWED_TELEGRAM_IDS": "",
            "KIRO_COMMAND": "kiro-cli acp --agent-engine v2",
            "WORKSPACE_BASE_PATH": "./workspaces/",
            "ALLOWED_FOLDERS": "",
            "MAX_PROCESSES": "3",
            "WARM_SECONDS": "300",
            "TOOL_APPROVAL": "ask",
            "SILENCE_SECONDS": "600",
            "START_SECONDS": "60",
            "RICH_MESSAGES": "on",
            "TRANSCRIBE_COMMAND": "",
            "LOG_LEVEL": "INFO",
            "TELEGRAM_API_URL": TELEGRAM_API}
AT_LEAST_ONE = (r"[1-9]\d{0,7}(\.\d+)?", "a number of at least 1")
FORMS = {"BOT_TOKEN": (r"\d+:[\w-]+", "what @BotFather gave you, such as 123456:ABC-DEF; put it into .env"),
         "ALLOWED_TELEGRAM_IDS": (r"(\b[1-9]\d{0,18}\b|[\s,])*", "numeric user ids (write to the bot to learn yours)"),
         "ALLOWED_FOLDERS": (r"[\s,]*([/~][^,]*(,[\s,]*|$))*", "absolute folders, separated by commas"),
         "MAX_PROCESSES": (r"[1-9]\d{0,7}", "a whole number of at least 1"),
         "WARM_SECONDS": (r"\d{1,8}(\.\d+)?", "a number of at least 0"),
         "TOOL_APPROVAL": ("ask|allow", "ask or allow"),
         "SILENCE_SECONDS": AT_LEAST_ONE,
         "START_SECONDS": AT_LEAST_ONE,
         "RICH_MESSAGES": ("on|off", "on or off"),
         "LOG_LEVEL": ("debug|info|warning|error|critical", "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
         "TELEGRAM_API_URL": (r"https?://[^\s/?#]+(/[^\s?#]*)?", "an http or https address")}
ALIKE = 0.85                    # of two names, by difflib; TELEGRAM_API_ID is less like TELEGRAM_API_URL


class SettingsError(Exception):
    """A setting is missing or bad; the text is one line that names it."""


class Settings(NamedTuple):
    """The settings of `.env`, checked."""
    token: str
    allowed: frozenset[int]       # Telegram user ids
    kiro_command: list[str]
    workspaces: Path              # absolute, resolved
    allowed_folders: list[Path]   # absolute, resolved: in and below them topics may work
    max_processes: int
    warm_seconds: float
    ask_permission: bool
    silence_seconds: float
    start_seconds: float
    rich_messages: bool
    transcribe_command: list[str]     # none: voice notes stay files
    log_level: str
    api_url: str
    folder: Path                  # the bot's own: `.env` and the database are here
    umask: int = 0o077            # Kiro's: the one that the bot was started with


def read_settings(env: dict[str, str], folder: Path, need_token: bool = True) -> Settings:
    """Return the settings found in `env`; relative paths are taken from `folder`.  Raises SettingsError."""
    values = {name: env.get(name, "").strip() or default for name, default in DEFAULTS.items()}
    for name, (pattern, form) in FORMS.items():
        if not re.fullmatch(pattern, values[name], re.ASCII | re.IGNORECASE) and (values[name] or need_token):
            raise SettingsError(f"{name} must be {form}")
    return Settings(
        token=values["BOT_TOKEN"],
        allowed=frozenset(map(int, re.findall(r"\d+", values["ALLOWED_TELEGRAM_IDS"]))),
        kiro_command=_words(values, "KIRO_COMMAND", folder),
        workspaces=_folder("WORKSPACE_BASE_PATH", values["WORKSPACE_BASE_PATH"], folder),
        allowed_folders=[_folder("ALLOWED_FOLDERS", text, folder)
                         for text in map(str.strip, values["ALLOWED_FOLDERS"].split(",")) if text],
        max_processes=int(values["MAX_PROCESSES"]),
        warm_seconds=float(values["WARM_SECONDS"]),
        ask_permission=values["TOOL_APPROVAL"].lower() == "ask",
        silence_seconds=float(values["SILENCE_SECONDS"]),
        start_seconds=float(values["START_SECONDS"]),
        rich_messages=values["RICH_MESSAGES"].lower() == "on",
        transcribe_command=_words(values, "TRANSCRIBE_COMMAND", folder),
        log_level=values["LOG_LEVEL"].upper(),
        api_url=values["TELEGRAM_API_URL"].rstrip("/"),
        folder=folder,
    )


def _words(values: dict[str, str], name: str, folder: Path) -> list[str]:
    try:
        return [_absolute(word, folder, is_program=n == 0) for n, word in enumerate(shlex.split(values[name]))]
    except ValueError as error:
        raise SettingsError(f"{name} can't be read as a command line: {error}") from error


def _absolute(word: str, folder: Path, is_program: bool) -> str:
    """Return a relative path that exists as absolute, since Kiro runs in another folder; anything else as it is."""
    if is_program and "/" not in word:         # it is on the PATH
        return sys.executable if word == "python" and not shutil.which(word) else word
    exists = os.path.exists if "/" in word else os.path.isfile
    return next(filter(exists, [str(base / word) for base in (folder, Path(__file__).resolve().parent)]), word)


def _folder(name: str, text: str, base: Path) -> Path:
    try:
        return (base / Path(text).expanduser()).resolve()
    except RuntimeError as error:          # ~nobody
        raise SettingsError(f"{name}: {text!r}: {error}") from error


class Redacted(logging.Formatter):
    """Log lines in which the bot's token can't appear, whatever brought it there [tg 5.6]."""

    secret = "\0"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(self.secret, "<token>")


def set_up_logging(settings: Settings) -> None:
    """Log to stderr, ours and every library's, through the one formatter."""
    journal = os.environ.get("JOURNAL_STREAM")         # which notes the time by itself
    in_journal = journal and journal == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
    formatter = Redacted(("" if in_journal else "%(asctime)s ") + "%(levelname)s %(message)s")
    formatter.secret = settings.token.partition(":")[2] or formatter.secret
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    telebot.logger.handlers.clear()
    telebot.logger.setLevel(max(logging.getLevelName(settings.log_level), logging.INFO))   # its DEBUG logs every answer
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)     # it warns of every connection it closes
    threading.excepthook = lambda args: log.critical("A thread ended unexpectedly", exc_info=args[:3])


# ======================================================================================================================
# Poll: updates in, one loop; gate and journal
# ======================================================================================================================

ALLOWED_UPDATES = ["message", "edited_message", "callback_query", "stopped_message_generation"]      # sticky, so always given
FIELDS = {"update_id", "id", "message_id", "from", "chat", "date", "chat_instance", "data", "message_thread_id", "draft_id",
          *ALLOWED_UPDATES}
NESTED = ["reply_to_message", "external_reply", "forward_origin"]
POLL_SECONDS = 25               # a long poll; Telegram's cap is 50 [tg 5.1]
CONFLICT_SECONDS = (2, POLL_SECONDS + 10)   # a stray one passes; else longer than a poll: two bots would take turns
CONFLICTS_AT_MOST = 8
STRANGER = "This bot is private. Your Telegram user id is {}; its owner can add it to ALLOWED_TELEGRAM_IDS."
STRANGERS_REMEMBERED = 1000
UNREADABLE = "I couldn't read what you sent just now. Please send it in another way."
EMPTY_SECONDS = 1               # between two empty answers; some servers give them at once
EDIT_SECONDS = 2 * 60           # how long after it was written a message can become a /stop


class Poll:
    """Fetch updates and hand them over.  Its thread waits for Telegram and the database only."""

    def __init__(self, bot: Bot) -> None:
        self._bot = bot
        self._strangers: deque[int] = deque(maxlen=STRANGERS_REMEMBERED)     # who was told their id
        self._env = b""                        # what `.env` says
        self._batch: list[tuple[Incoming, InboxMessage, Optional[str]]] = []     # with the state of an edited one's old version
        self._update: dict[str, Any] = {}      # the one in hand
        self._told_of_trouble: set[tuple[int, int]] = set()        # (user, thread)
        self._telebot = parser = telebot.TeleBot(bot.settings.token, threaded=False)
        for add, handler in ((parser.add_message_handler, self._on_message),
                             (parser.add_edited_message_handler, self._on_message),
                             (parser.add_callback_query_handler, self._on_press),
                             (parser.add_stopped_message_generation_handler, self._on_stop)):
            add({"function": handler, "pass_bot": False, "filters": {}})       # no filters, since the gate decides

    def run(self) -> None:
        """Poll until the bot closes.  The next poll's offset is what tells Telegram that a batch was received [tg 5.5]."""
        bot, offset, failures, conflicts, has_webhook = self._bot, None, 0, 0, False
        while not bot.closing.is_set():
            asked_at = time.monotonic()
            try:
                if has_webhook:
                    log.warning("Removing the webhook that was set for this bot, since it polls")
                    has_webhook = False
                    bot.telegram.call(apihelper.delete_webhook)
                for row in bot.store.take_told():          # by bot.py --tell, on this machine
                    if row.user_id in bot.settings.allowed:
                        bot.attempt(bot.commands.take_told, row)
                updates = bot.telegram.call(apihelper.get_updates, offset=offset, timeout=10,
                                            long_polling_timeout=POLL_SECONDS, allowed_updates=ALLOWED_UPDATES)
                self._look_at_env()
                self._take(updates)
                offset = max((update["update_id"] + 1 for update in updates), default=offset)
                if failures:
                    log.info("Polling again")
                failures = conflicts = 0
                pause = 0 if updates else asked_at + EMPTY_SECONDS - time.monotonic()
            except Unauthorized:
                return bot.quit(1, "Telegram no longer accepts BOT_TOKEN (401): get the current one from @BotFather")
            except Conflict as error:      # another bot's poll, one of our own that lingers, or a webhook
                log.error("%s", error)
                conflicts += 1
                if conflicts > CONFLICTS_AT_MOST:
                    return bot.quit(1, f"Giving up: {error}")
                has_webhook = "webhook" in str(error)
                pause = 0 if has_webhook else CONFLICT_SECONDS[conflicts > 1]
            except (TelegramError, StoreError) as error:
                pause = getattr(error, "seconds", retry_delay(failures))
                log.log(logging.DEBUG if failures else logging.WARNING, "Messages can't be polled: %s", error)
                failures += 1
            bot.closing.wait(max(0, pause))

    def _look_at_env(self) -> None:
        """Take over who may use the bot, when `.env` has changed."""
        settings = self._bot.settings
        path = settings.folder / ".env"
        try:
            content = path.read_bytes() if path.exists() else self._env
            if content == self._env:
                return
            self._env = content
            allowed = load_settings(settings.folder, need_token=False).allowed
        except (OSError, SettingsError) as error:
            return log.error("Who may use the bot stays as it was: %s", error)
        if allowed != settings.allowed:
            self._bot.settings = settings._replace(allowed=allowed)
            log.info("Allowed from now on: %s", describe_allowed(self._bot.settings))

    def _take(self, updates: list[dict]) -> None:
        """Journal and hand over a batch.  Raises StoreError: it is not to be acknowledged."""
        batch = self._batch = []
        for update in updates:
            self._dispatch(update)
        try:
            new = self._bot.store.receive(
                [row for _, row, state in batch if state is None],
                [row for incoming, row, state in batch if state is not None and incoming.command not in OWN])
        except StoreError as error:
            self._tell_of_trouble(batch, error)
            raise
        self._told_of_trouble.clear()
        last = {incoming.key: incoming for incoming, _, _ in batch}
        for incoming, row, state in batch:
            incoming.followed = last[incoming.key] is not incoming
            if state is not None:
                self._bot.attempt(self._bot.commands.edit, incoming, state)
            elif row.update_id in new:
                self._bot.attempt(self._bot.commands.route, incoming)

    def _dispatch(self, update: dict) -> None:
        """Parse one update and let its handler look at it; whatever is wrong with it stays with it."""
        self._update = update
        try:
            self._telebot.process_new_updates([types.Update.de_json(plain(update))])
        except StoreError:
            raise
        except Exception as error:   # whatever is in it; a bad update must not stop the others
            log.error("Update %s can't be read and is left out: %r", update["update_id"], error)
            self._apologize(update)

    def _apologize(self, update: dict) -> None:
        """Tell an allowed user where they wrote that it was left out, if that much of it can be read."""
        try:
            message = message_in(update)
            if self._lets_in(update.get("callback_query", message)["from"], message["chat"]):
                self._bot.tell((message["chat"]["id"], thread_of(message)), UNREADABLE)
        except (KeyError, TypeError, AttributeError):
            pass

    def _tell_of_trouble(self, batch: list, error: StoreError) -> None:
        """Say it in each topic that wrote, once until the journal can be written again."""
        topics = {incoming.key for incoming, _, _ in batch} - self._told_of_trouble
        self._told_of_trouble |= topics
        for key in topics:
            self._bot.tell(key, f"⚠️ I can't store messages at the moment ({error}). "
                                "Yours is safe with Telegram; I'll take it as soon as I can.")

    # -- the gate: first of all, who and where -------------------------------------------------------------------------

    def _lets_in(self, sender: dict, chat: dict) -> bool:
        """Only allowed users in their own private chat; in a group others would read the answers."""
        return chat["type"] == "private" and chat["id"] == sender["id"] and sender["id"] in self._bot.settings.allowed

    def _tell_stranger(self, message: dict) -> None:
        """Tell a stranger their id, once; that is how an owner learns it."""
        sender = message["from"]
        stranger = sender["id"]
        is_person = message["chat"]["type"] == "private" and not sender.get("is_bot")      # the bot's own doings are told, too
        if is_person and stranger not in self._strangers:
            log.info("A stranger wrote: user %s", stranger)
            self._bot.telegram.call(apihelper.send_message, stranger, STRANGER.format(stranger), chat=stranger,
                                    message_thread_id=thread_of(message) or None)
            self._strangers.append(stranger)

    # -- handlers: they look, and say what is to be done once the batch is in the journal ---------------------------------

    def _on_message(self, _: types.Message) -> None:
        """A message, or a new version of one."""
        update, message = self._update, message_in(self._update)
        if not self._lets_in(message["from"], message["chat"]):
            return self._bot.errand("strangers", self._tell_stranger, message) if "message" in update else None
        if message.keys() & util.content_type_service and not self._is_named(message):
            return
        ids = update["update_id"], message["chat"]["id"], thread_of(message), message["message_id"]
        struct.pack("4q", *ids)                # raises for what the database would not take
        row, state = InboxMessage(*ids, json.dumps(update)), None
        incoming = Incoming.from_journal(row)
        if "edited_message" in update:
            body, state = self._bot.store.find_message(row.user_id, row.message_id)
            if "location" in message or body and contents(message_in(json.loads(body))) == contents(incoming.message):
                return                         # it moves, or got a reaction, or a link preview [tg 7]
        self._batch.append((incoming, row, state))

    def _is_named(self, message: dict) -> bool:
        """Note what is told of a topic's name; return whether somebody gave it to a new one, as it may be a folder's."""
        created = message.get("forum_topic_created", {})
        name = created["name"] if created.get("is_name_implicit") else ""
        if created or "forum_topic_edited" in message:
            self._bot.conversation(message["chat"]["id"], thread_of(message)).implicit_name = name
        return bool(created and not name and self._bot.settings.allowed_folders)

    def _on_press(self, press: types.CallbackQuery) -> None:
        """A press needs no journal: it counts at once, and on a full disk too."""
        sender, message = self._update["callback_query"]["from"], message_in(self._update)
        if message:
            press.message.json = message
        if self._lets_in(sender, message["chat"] if message else {**sender, "type": "private"}):
            self._bot.attempt(self._bot.commands.press, press)

    def _on_stop(self, stop: types.MessageGenerationStopped) -> None:
        chat = self._update["stopped_message_generation"]["chat"]      # there is no sender: the chat decides [tg 1.3]
        if self._lets_in(chat, chat):
            self._bot.attempt(self._bot.commands.stop_draft, chat["id"], stop.draft_id)


def plain(part: dict) -> dict:
    """Return an update, or a part of one, with only the fields that telebot is asked for: it stumbles over what it does not
    know, in quotes and forwards too [tg 1.3, 7]."""
    return {name: plain(value) if name in ALLOWED_UPDATES else value for name, value in part.items() if name in FIELDS}


def message_in(update: dict) -> Optional[dict]:
    """Return the message of an update, or the one whose button was pressed."""
    return update.get("message") or update.get("edited_message") or update.get("callback_query", {}).get("message")


class Incoming:
    """A message that a conversation is to handle."""

    def __init__(self, update_id: int, message: dict) -> None:
        self.update_id = update_id
        self.message = message                 # as Telegram sent it
        self.arrived = time.monotonic()
        self.files: Optional[list[Attachment]] = None      # once they are downloaded
        self.followed = False                  # by another that came with it
        text = "" if "forward_origin" in message else message.get("text", "")     # what somebody else wrote commands nothing
        if "forum_topic_created" in message:       # a folder's name, maybe
            text = f"/folder {message['forum_topic_created']['name']}"
        match = re.match(r"/([A-Za-z0-9_-]+)(?:@\w+)?(?!\S)\s*(.*)", text, re.DOTALL)
        self.command, self.argument = (match[1].lower(), match[2].strip()) if match else ("", "")

    @classmethod
    def from_journal(cls, row: InboxMessage) -> Incoming:
        """Return the message of a journal row; without what it quotes, if that can't be read.  Raises anything when its own
        words can't."""
        message = message_in(json.loads(row.body))
        try:
            full_text(message), files_of(message)
        except Exception:   # something new
            message = {name: value for name, value in message.items() if name not in NESTED} | {"quote": UNREAD}
            contents(message)
        return cls(row.update_id, message)

    @property
    def key(self) -> tuple[int, int]:
        """(user, thread)"""
        return self.message["chat"]["id"], thread_of(self.message)

    @property
    def patience(self) -> float:
        """How long to wait for what belongs to it: an album has no end mark [tg 4], a long pasted text is split by the client,
        a comment and its forward, or several files, come one by one [tg 7]."""
        if "media_group_id" in self.message or len(self.message.get("text", "")) >= SPLIT_TEXT_LENGTH:
            return JOIN_SECONDS
        has_company = self.followed or "forward_origin" in self.message or file_in(self.message)
        return REST_SECONDS if has_company else 0


def thread_of(message: dict) -> int:
    """Return the topic's id, 0 outside; message_thread_id alone also appears on replies [tg 3.2]."""
    return message.get("message_thread_id", 0) if message.get("is_topic_message") else 0


# ======================================================================================================================
# The bot: what all parts share
# ======================================================================================================================

class Closing(Exception):
    """The bot is stopping: leave everything as it is."""


def own_update(user_id: int, thread_id: int, text: str) -> str:
    """Return the JSON of an update with a message that Telegram did not send."""
    return json.dumps({"message": {"message_id": 0, "chat": {"id": user_id}, "text": text, "message_thread_id": thread_id,
                                   "is_topic_message": bool(thread_id)}})


class Bot:
    """Everything with one owner: settings, database, Telegram, places, conversations, living Kiro processes."""

    def __init__(self, settings: Settings, store: SessionStore) -> None:
        self.settings = settings
        self.store = store
        self.closing = threading.Event()       # no new turns, no repeats
        self.exit_status = 0
        self.help = HELP
        self._bell, self.bell_handle = os.pipe()   # main waits for a byte: a lock would not always let a signal through
        self.telegram = Telegram(settings, self.closing)
        self.places = Places(settings.max_processes)
        self.processes: set[Kiro] = set()      # started and not gone; each has a keeper that ends it
        self.spawning = threading.Lock()       # so that none is started unseen while the bot closes
        self.questions = Questions(self.errand)
        self.commands = Commands(self)
        self._conversations: dict[tuple[int, int], Conversation] = {}
        self._lock = threading.Lock()
        self._errands: dict[Any, deque[Callable[[], Any]]] = {}      # by key; those of one key run one after the other

    def chat(self, user_id: int, thread_id: int) -> Topic:
        """Return a way to speak in this topic."""
        return Topic(self.telegram, user_id, thread_id, self.settings.rich_messages)

    def conversation(self, *key: int) -> Conversation:
        """Return the conversation of this (user, thread), made when there was none."""
        with self._lock:
            if key not in self._conversations:
                self._conversations[key] = Conversation(self, key)
            return self._conversations[key]

    def conversations(self) -> list[Conversation]:
        """Return the conversations there are."""
        with self._lock:
            return list(self._conversations.values())

    def errand(self, key: Any, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run something short that talks to Telegram, away from the calling thread.

        Errands of one key, a topic for one, run in order and take one thread at most, so that none holds up the others.
        """
        with self._lock:
            mine = self._errands.get(key, deque())
            mine.append(lambda: action(*args, **kwargs))
            if len(mine) == 1:
                threading.Thread(target=self._run_errands, args=(key, mine), name="errand", daemon=True).start()
                self._errands[key] = mine      # not if there is no thread to be had

    def _run_errands(self, key: Any, mine: deque[Callable[[], Any]]) -> None:
        while True:
            self.attempt(mine[0])
            with self._lock:
                mine.popleft()
                if not mine:
                    del self._errands[key]
                    return

    def attempt(self, action: Callable[..., Any], *args: Any) -> None:
        """Do something whose failure must not keep others from what comes after it."""
        try:
            action(*args)
        except Closing:
            pass
        except (TelegramError, StoreError) as error:
            log.warning("Not done: %s", error)
        except Exception:   # a bug
            log.exception("Something was not done")

    def tell(self, key: tuple[int, int], text: str, *buttons: Any, silent: bool = False) -> None:
        """Say something in a topic, without waiting for it."""
        self.errand(key, self.conversation(*key).tell, text, *buttons, silent=silent)

    def take(self, row: InboxMessage) -> None:
        """Take on a journaled message.  Raises anything when it can't be read."""
        self.commands.route(Incoming.from_journal(row))

    def say_as(self, user_id: int, thread_id: int, text: str) -> None:
        """Take on a text as if the user had written it in this topic: what a button stands for, in the journal like it.

        Raises StoreError.
        """
        self.take(self.store.receive_own(user_id, thread_id, own_update(user_id, thread_id, text)))

    def note(self, write: Callable[..., None], *args: Any) -> None:
        """Write into the journal, late rather than never."""
        try:
            write(*args)
        except StoreError as error:
            log.error("What was done can't be journaled (%s): %s", write.__name__, error)
            self.errand((write.__name__, *args), self._note_later, write, args)

    def _note_later(self, write: Callable[..., None], args: tuple) -> None:
        self.telegram.pause(JOURNAL_RETRY_SECONDS)
        self.note(write, *args)

    def quit(self, status: int, reason: str) -> None:
        """End the program with this exit status."""
        log.log(logging.ERROR if status else logging.INFO, "%s", reason)
        self.exit_status = status
        os.write(self.bell_handle, b"!")

    def rings(self, seconds: float) -> bool:
        """Wait until the program should end, at most so long; say whether it should."""
        return bool(select.select([self._bell], [], [], seconds)[0])

    def recover(self) -> None:
        """Take up what a former run left: its processes, unfinished turns, and the messages that still wait.

        The processes first and at once: while one works, its turn must not be offered again.  That takes a listing of /proc,
        and seconds only if some process holds out against TERM.
        """
        end_orphans(self.settings.folder)
        for turn in self.store.unfinished():
            if turn.user_id in self.settings.allowed:
                self.conversation(turn.user_id, turn.thread_id).finish_turn(turn)
        for row in self.store.waiting():
            if row.user_id in self.settings.allowed:
                self.attempt(self.take, row)

    def shut_down(self) -> None:
        """Within two seconds: cancel and end of stdin for all children, TERM, KILL; keep what was said for the cards."""
        self.closing.set()
        began, conversations = time.monotonic(), self.conversations()
        if self.spawning.acquire(timeout=0.5):  # whoever was starting a process has listed it, unless the disk hangs
            self.spawning.release()
        for kiro in list(self.processes):
            kiro.cancel()
            kiro.end(patience=None)
        for deadline, grace in ((1.0, 0.4), (1.8, 0)):
            # also while a part is on its way: a stop between its arrival and its tick would send it twice
            while (self.processes or any(c.delivery.sending for c in conversations)) and time.monotonic() - began < deadline:
                time.sleep(0.01)
            end_processes(lambda: [*running(is_ours), *(pid for kiro in list(self.processes) for pid in kiro.family())], grace)
        noting = threading.Thread(target=lambda: [c.keep_partial() for c in conversations], name="last words", daemon=True)
        noting.start()                         # the database may be locked by somebody for longer than we have
        noting.join(max(0.1, began + 1.9 - time.monotonic()))


# ======================================================================================================================
# Commands: what the bot answers itself
# ======================================================================================================================

# Telegram's menu and the console's /help.  A command is answered in `Commands.route`, or by a `Job` in its turn; HELP tells it.
COMMANDS = {"new": "Start a fresh session in this topic",
            "stop": "Stop what Kiro is doing",
            "model": "Show or choose the model",
            "folder": "Show or choose the folder to work in",
            "sessions": "Go on with another session of this folder",
            "status": "Session, model, folder, what is running",
            "get": "Send a file of this topic's folder",
            "help": "What this bot can do"}
HELP = """I give every topic of this chat its own Kiro session with its own folder. Just write; Kiro answers.

• While Kiro works you can go on writing: it all goes to Kiro together when the answer is there.
• To send a correction at once: write it, then press Stop.
• Photos, files and voice messages are saved in the topic's folder (uploads/), and Kiro is told where.
• Reply to a message, or quote a part of it, and Kiro sees what you mean.
• Kiro can send you files from its folder.

/new – a fresh session in this topic (folder and model stay)
/stop – stop what Kiro is doing; so does the Stop button below a draft
/model – show or choose the model
/folder – show or choose the folder to work in
/sessions – go on with another session of this folder, also one from a terminal
/terminal – go on with this session in a terminal
/status – session, model, folder, what is running; what waits can be taken back there
/get PATH – send a file of the topic's folder
Any other /command goes to Kiro as it is, for example /compact."""
OWN = {*COMMANDS, "terminal", "start"}      # commands that are not Kiro's
FROM_SERVER = "[From the server, not from the user:]\n"
UNSUPPORTED = "I can't pass on this kind of message. Send it as text or as a file."
OVER = "This is over."
IN_TERMINAL = "Continue in a terminal"
THIS_RUN = secrets.token_hex(4)     # tells this run's questions from those of former ones
STATUS_WORDS, STATUS_WAITING = 40, 8     # characters of a waiting message, and how many, that /status shows
Said = tuple[str, list]              # what the bot answers, and the buttons below


class Commands:
    """Answers commands and presses.  `route`, `edit`, `press` and `stop_draft` are called on the poll thread: they only
    look and hand over; the rest runs as errands."""

    def __init__(self, bot: Bot) -> None:
        self._bot = bot

    def route(self, incoming: Incoming) -> None:
        """Hand a journaled message to whoever answers it."""
        bot, key, command, message = self._bot, incoming.key, incoming.command, incoming.message
        conversation, is_written = bot.conversation(*key), incoming.update_id >= 0 and not command
        is_answered = command in ANSWERS and (command != "model" or conversation.agent.models)
        if (command == "stop" and conversation.stop()      # at once: errands of the topic may be waiting
                or is_written and bot.questions.hear(key, message.get("text", ""))):
            bot.errand(key, bot.store.done, incoming.update_id)        # what stops says so, when it is true
        elif not is_answered and (command in JOBS or any(contents(message))):
            conversation.add(incoming)
        else:
            bot.errand(key, self._answer, incoming)

    def _answer(self, incoming: Incoming) -> None:
        conversation, answer = self._bot.conversation(*incoming.key), ANSWERS.get(incoming.command)
        text, buttons = answer(conversation, incoming.argument) if answer else (UNSUPPORTED, [])
        try:
            if text:
                conversation.tell(text, buttons)
        except Refused as error:               # blocked: it would not go better at the next start
            log.warning("Not said: %s", error)
        self._bot.store.done(incoming.update_id)

    def take_told(self, row: InboxMessage) -> None:
        """Take on a message that `bot.py --tell` has left, and show what Kiro is asked."""
        incoming = Incoming.from_journal(row)
        text = counted(incoming.message["text"].removeprefix(FROM_SERVER))
        self._bot.tell(incoming.key, f"⏰ From the server: {text}", silent=True)
        self.route(incoming)

    def edit(self, incoming: Incoming, state: str) -> None:
        """A message was edited: as long as it waits, or is `offered`, it goes as edited."""
        conversation, message = self._bot.conversation(*incoming.key), incoming.message
        if incoming.command == "stop" and message.get("edit_date", math.inf) - message["date"] <= EDIT_SECONDS:
            conversation.stop()
        is_own = incoming.command in OWN           # no better version of a message; it stays as it was
        if not is_own and not conversation.edit(incoming) and state not in ("", "offered"):
            self._bot.tell(incoming.key, "Your edit came too late: the message was taken as it was. "
                                         "Send the correction as a new message.")

    def stop_draft(self, user_id: int, draft_id: int) -> None:
        """The Stop button of a draft; only the running turn's own draft counts."""
        for conversation in self._bot.conversations():
            if conversation.key[0] == user_id:
                conversation.stop(draft_id)

    def press(self, press: types.CallbackQuery) -> None:
        """A button: data that this bot didn't make does nothing."""
        data = press.message and press.data or ""
        for pattern, method in self.PRESSES.items():
            if match := re.fullmatch(pattern, data, re.ASCII):
                return self._bot.errand((press.from_user.id, match[1]), method, self, press, *match.groups())
        self._toast(press, OVER)

    def _decide(self, press: types.CallbackQuery, token: str, index: str) -> None:
        choice = self._bot.questions.decide(press.from_user.id, token, int(index), press.message.message_id)
        self._toast(press, choice or OVER)
        if not choice and not token.startswith(THIS_RUN):      # else whoever decided it edits the message
            self._settle(press, OVER)

    def _again_or_drop(self, press: types.CallbackQuery, turn_id: str) -> None:
        rows, is_again = self._bot.store.messages_of(int(turn_id)), press.data.startswith("again")
        is_theirs = rows and rows[0].user_id == press.from_user.id
        done = is_theirs and self._bot.store.drop(int(turn_id), then="waiting" if is_again else "done")
        for row in rows if done and is_again else ():
            self._bot.take(row)
        text = OVER if not done else "Asked again." if is_again else "Dropped."
        self._toast(press, text)
        self._settle(press, text)

    def _remove(self, press: types.CallbackQuery, thread_id: str, update_id: str) -> None:
        removed = self._bot.conversation(press.from_user.id, int(thread_id)).remove(int(update_id))
        if removed:
            self._bot.store.done(int(update_id))
        self._toast(press, "Removed" if removed else OVER)

    def _changes(self, press: types.CallbackQuery, thread_id: str, turn_id: str) -> None:
        conversation = self._bot.conversation(press.from_user.id, int(thread_id))
        changes = conversation.changes.get(int(turn_id))
        self._toast(press, "" if changes else OVER)
        if changes:
            conversation.chat.show(changes, "changes.diff")

    def _say(self, press: types.CallbackQuery, thread_id: str, command: str) -> None:
        self._bot.say_as(press.from_user.id, int(thread_id), command)
        self._toast(press, "OK")

    def _toast(self, press: types.CallbackQuery, text: str) -> None:
        """Answer the press, first of all: Telegram lets it expire [tg 3.1]."""
        self._bot.errand(press.id, self._bot.telegram.call, apihelper.answer_callback_query, press.id, text[:200],
                         chat=press.from_user.id)

    def _settle(self, press: types.CallbackQuery, text: str) -> None:
        """Take the buttons off the message that was pressed, and say there what became of it; not when somebody made the press
        up, and the message has no such button."""
        message = press.message.json
        rows = message.get("reply_markup", {}).get("inline_keyboard", [])
        if any(button.get("callback_data") == press.data for row in rows for button in row):
            text = "\n\n".join(filter(None, [message.get("text"), text]))
            self._bot.chat(press.from_user.id, 0).settle(press.message.message_id, text)

    PRESSES = {r"ask:([0-9a-f]{16}):(\d{1,3})": _decide,        # by data; a method gets the press and the groups, as an errand
               r"(?:again|drop):(\d{1,18})": _again_or_drop,
               r"remove:(\d{1,18}):(-?\d{1,18})": _remove,
               r"changes:(\d{1,18}):(\d{1,18})": _changes,
               r"say:(\d{1,18}):(/(?:model|folder|sessions|terminal) [0-9a-f]{16})": _say}


def show_help(conversation: Conversation, _: str) -> Said:
    """Answer /help."""
    theirs = conversation.agent.commands
    return "\n".join([conversation.bot.help, *(theirs and ["\nKiro's own:", *theirs])]), []


def stop_sending(conversation: Conversation, _: str) -> Said:
    """Answer /stop when no turn is running."""
    if not conversation.delivery.held:
        return "Nothing is running in this topic.", []
    conversation.post("give_up")
    return "", []


def get_file(conversation: Conversation, path: str) -> Said:
    """Answer /get: send a file of the topic's folder, as Kiro can."""
    refusal = conversation.delivery.upload({"path": path, "caption": ""}, silent=False)
    return f"⚠️ /get PATH sends a file of this topic's folder, but {refusal}." if refusal else "", []


def show_status(conversation: Conversation, _: str) -> Said:
    """Answer /status: what concerns people first, with buttons that take back what waits."""
    agent, delivery, thread_id = conversation.agent, conversation.delivery, conversation.key[1]
    record, known = agent.record(), agent.known
    with conversation.lock:
        turn, waiting = conversation.turn, list(conversation.waiting)
    shown = [(one_line(words(m.message), STATUS_WORDS), m.update_id) for m in waiting[:STATUS_WAITING]]
    lines = [turn.status(), *plan_lines(turn.answer.plan)] if turn else ["Nothing is running."]
    if delivery.held:
        lines.append(f"The answer is ready; Telegram does not take it, try {delivery.tries + 1}. /stop gives it up.")
    lines += [f"Waiting: {text}" for text, _ in shown]
    if len(waiting) > STATUS_WAITING:
        lines.append(f"and {len(waiting) - STATUS_WAITING} more")
    lines.append(f"Model: {agent.model()}")
    if known.context is not None:
        lines.append(f"Context used: {known.context:.0f} %")
    if known.credits is not None:
        lines.append(f"Credits: {known.credits:.4g} in the last turn, {known.spent:.4g} in this session")
    lines += [f"Session: {record.session_id or 'none yet'}", f"Topic: {record.user_id}/{thread_id}",
              f"Folder: {record.workspace_path}"]
    buttons = [[(f"Remove: {text}", f"remove:{thread_id}:{update_id}")] for text, update_id in shown]
    return "\n".join(lines), buttons + session_button(conversation, "terminal", IN_TERMINAL)


def answer_model(conversation: Conversation, wanted: str) -> Said:
    """Choose a model, or list them when none is wanted."""
    agent = conversation.agent
    names, present = agent.model_names(), agent.model()
    if not names:
        return "Kiro reports no models to choose from.", []
    if name := chosen(wanted, names):
        conversation.store.set_model(*conversation.key, name)
        return f"Model for this topic: {name}, from the next message on.", []
    text = f"Model for this topic: {present}. Choose with /model NAME or here:"
    if wanted:
        text = f"Kiro has no model {wanted!r}. The model stays {present}. It offers: {', '.join(names)}"
    return text, choices(conversation, "model", agent.models.offered[:MODELS_SHOWN], present)


ANSWERS = {"start": show_help, "help": show_help, "stop": stop_sending, "status": show_status, "get": get_file,
           "model": answer_model}         # by command: what needs no place in the queue; a model does until Kiro told them


def key_of(name: str) -> str:
    """Return 16 hex digits for a path or an id, which may not fit into a button's 64 bytes [acp 11]."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def choices(conversation: Conversation, command: str, options: Iterable[tuple[str, str]], present: str = "") -> Buttons:
    """Return a button for each (name, label), which stands for the command with this name's key."""
    prefix = f"say:{conversation.key[1]}:/{command}"
    return [[("✓ " * (name == present) + label, f"{prefix} {key_of(name)}")] for name, label in options]


def session_button(conversation: Conversation, command: str, label: str) -> Buttons:
    """Return a button for the session that the topic has, none when nothing was said in it."""
    record = conversation.agent.record()
    said = record.session_id and conversation.store.get_facts(record.session_id).ended
    return choices(conversation, command, [(record.session_id, label)] if said else [])


def chosen(wanted: str, names: Iterable[str]) -> Optional[str]:
    """Return the name that is wanted, given by itself or by its key."""
    return next((name for name in names if wanted in (name, key_of(name))), None)


# ======================================================================================================================
# Conversation: what waits, what comes next
# ======================================================================================================================

JOIN_SECONDS = 1.0              # how long to wait for the rest of an album or of a pasted text
REST_SECONDS = 0.3              # and for what comes with a forward or a file
SPLIT_TEXT_LENGTH = 4000        # clients split a pasted text at 4096
JOURNAL_RETRY_SECONDS = 15
LOOK_SECONDS = 60               # the longest sleep of a conversation's thread
FROZEN_GAP = 5                  # seconds late: this program did not run, and Kiro's silence counts anew
EXCERPT_LENGTH = 300            # characters of what was asked, on a card
SIGN_INS_AT_MOST = 10           # of one process
SIGN_IN_HINT = "\nIf the page can't be reached then, sign in once on the server: kiro-cli chat there."
SEEN = "👀"


class Conversation:
    """What belongs to one (user, thread): what waits, the turn, the process.

    `add`, `edit`, `stop`, `remove` and `post` may be called from any thread and return at once; `tell` waits for Telegram.
    Everything else runs on the conversation's own thread, which exists while there is work or a warm process.
    """

    def __init__(self, bot: Bot, key: tuple[int, int]) -> None:
        self.bot, self.store, self.chat, self.key = bot, bot.store, bot.chat(*key), key
        self.lock = threading.Lock()            # guards the next four, and the turn's phase
        self.waiting: deque[Incoming] = deque()
        self.unfinished: deque[UnfinishedTurn] = deque()
        self.turn: Optional[Turn] = None        # there is one whenever something waits or runs
        self._running = False                   # is there a thread
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.agent = Agent(self)
        self.delivery = Delivery(self)
        self._warm_until = 0.0
        self.notes = Notes()
        self.implicit_name = ""                 # of a topic that nobody has named
        self.changes: dict[Optional[int], str] = {}     # what the last turn did to files, by turn; replaced as a whole

    # -- for all threads -----------------------------------------------------------------------------------------------

    def post(self, event: str, *args: Any) -> None:
        """Have the conversation's thread call this `_on_` method."""
        self._events.put(functools.partial(getattr(self, f"_on_{event}"), *args))

    def add(self, incoming: Incoming) -> None:
        """Take on a message."""
        with self.lock:
            has_to_wait = self.unfinished or self.turn and self.turn.turn_id is not None
            is_seen = has_to_wait and not self.waiting and incoming.message["message_id"]      # the first tells enough
            self.waiting.append(incoming)
            self._start()
        self.post("wake")
        if is_seen:
            self.bot.errand(self.key, self.chat.react, incoming.message["message_id"], SEEN)

    def finish_turn(self, turn: UnfinishedTurn) -> None:
        """Take on a turn that a former run has left behind."""
        with self.lock:
            self.unfinished.append(turn)
            self._start()
        self.post("wake")

    def _start(self) -> None:
        """See to it that there is a turn for what waits, and a thread.  The lock is held."""
        if self.waiting and self.turn is None:
            self.turn = Turn(self)
        if not self._running:
            threading.Thread(target=self._run, name=f"conversation {self.key}", daemon=True).start()
            self._running = True

    def edit(self, incoming: Incoming) -> bool:
        """Replace a waiting message by its edited version; return False when it does not wait."""
        message = incoming.message
        with self.lock:
            for n, old in enumerate(self.waiting):
                if old.message["message_id"] == message["message_id"]:
                    incoming.update_id, incoming.arrived = old.update_id, old.arrived
                    if files_of(old.message) == files_of(message):
                        incoming.files = old.files
                    self.waiting[n] = incoming
                    return True
        return False

    def stop(self, draft_id: Optional[int] = None) -> bool:
        """End the turn; return False when there is none, or not this draft's."""
        with self.lock:
            turn = self.turn
            if turn is None or turn.phase is Phase.OVER or draft_id not in (None, turn.draft.id):
                return False
            if turn.phase is not Phase.STOPPING:
                turn.stop(waiting=len(self.waiting))
            turn.draft.stopped |= draft_id is not None
        self.post("wake")
        return True

    def remove(self, update_id: int) -> bool:
        """Take a waiting message back; return False when it does not wait any more."""
        with self.lock:
            left = deque(incoming for incoming in self.waiting if incoming.update_id != update_id)
            removed, self.waiting = len(left) < len(self.waiting), left
            if removed and not left and self.turn and not self.turn.messages:
                self.turn.stop(waiting=0)      # there is nothing left to do for it
        self.post("wake")
        return removed

    def tell(self, text: str, buttons: Optional[Buttons] = None, silent: bool = False) -> None:
        """Send a message of the bot's own, and have the draft that it hides sent anew."""
        self.chat.say(text, buttons, silent)
        if self.turn:
            self.post("wake")

    def keep_partial(self) -> None:
        """Keep what Kiro has said in a turn that is being cut off, for the card at the next start."""
        turn = self.turn
        if turn and turn.turn_id is not None:  # also one that is over: its answer may not be journaled yet
            self.bot.note(self.store.keep_partial, turn.turn_id, turn.answer.text())

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._has_work():
                self._step()
        except Closing:
            pass
        except BaseException:              # a bug in what deals with bugs: the next message gets another thread
            with self.lock:
                self._running = False
            raise

    def _has_work(self) -> bool:
        """Is there a reason for this thread to go on?  If not, it counts as gone from here on: `_start` makes another."""
        with self.lock:
            self._running = bool(self.waiting or self.unfinished or self.delivery.held or self.agent.kiro or self.agent.former)
            return self._running

    def _step(self) -> None:
        """Do the next piece of work; whatever goes wrong with it must not stop those that follow."""
        turn = None if self.unfinished else self.turn
        try:
            if self.unfinished:
                self._recover()
            elif turn:
                self._serve(turn)
            elif self.delivery.is_due():
                self.delivery.try_again()
            else:
                self._idle()
        except (NoPlace, Stopped):
            pass
        except Exception as error:   # a bug, or the database: the topic must hear of it, and the next message must work
            if isinstance(error, Closing) or self.bot.closing.is_set():
                raise Closing from error
            log.error("Conversation %s/%s: %s", *self.key, error, exc_info=not isinstance(error, StoreError))
            if isinstance(error, StoreError) and not (turn and turn.phase is Phase.OVER):
                return self._await_store(turn, error)
            self.agent.let_go(at_once=True)
            if turn and turn is self.turn:
                self._give_up(turn, error)

    def _give_up(self, turn: Turn, error: Exception) -> None:
        """A turn has failed in an unforeseen way."""
        with self.lock:
            given_up = turn.messages or self.batch()
            self.waiting = deque(incoming for incoming in self.waiting if incoming not in given_up)
        self._close(turn)
        self.bot.tell(self.key, f"⚠️ Something went wrong here: {error}. "
                                "Your message is kept; I'll come back to it when I'm restarted, or send it again.")

    def _await_store(self, turn: Optional[Turn], error: StoreError) -> None:
        """The database can't be used: nothing has begun, the messages wait on, and the next step tries again."""
        if turn:
            with self.lock:
                self.waiting.extendleft(reversed(turn.messages))
                turn.messages = []
            if not turn.awaits_store:
                turn.awaits_store = True
                self.bot.tell(self.key, f"⚠️ I can't use my database ({error}), so Kiro has to wait. I'll keep trying.",
                              silent=True)
        until = time.monotonic() + JOURNAL_RETRY_SECONDS
        while time.monotonic() < until and not (turn and turn.phase is Phase.STOPPING):
            self.pump(until)

    def _serve(self, turn: Turn) -> None:
        """Do what waits longest."""
        self.agent.take_back()
        self._tell_sign_ins()
        with self.lock:
            job = self._next_job()
            if job:
                self.move([job], turn)
        if job:
            run_job(self, job)
        elif outcome := turn.run():
            self._conclude(turn, outcome)
        self._close(turn)
        if not (self.turn or job and job.command == "terminal"):       # the turn starts what it needs; a terminal has it now
            self._warm_up()

    def _close(self, turn: Turn) -> None:
        """The turn is over; whatever waits gets the next one."""
        turn.end()
        with self.lock:
            self.turn = Turn(self) if self.waiting else None

    def _idle(self) -> None:
        """Keep the process ready for a message until it was kept long enough, or its place is needed; await others' end."""
        kiro, until = self.agent.kiro, self.delivery.try_at
        if kiro:
            if kiro.exit_noticed or time.monotonic() >= self._warm_until:
                return self.agent.let_go()
            if not kiro.kept_warm:
                self.agent.offer_place()
            until = min(until, self._warm_until)
        self.pump(until)

    def _warm_up(self) -> None:
        """Start the next process of this thread early, to hide the seconds that start and load take [acp 4.3]."""
        if not self.bot.settings.warm_seconds or self.agent.known.refusals:
            return self.agent.let_go()
        self._warm_until = time.monotonic() + self.bot.settings.warm_seconds
        try:
            self.agent.ready()
        except KiroFailure as failure:
            log.warning("No warm process for %s/%s: %s", *self.key, failure)
            self.agent.let_go(at_once=True)

    # -- what waits ----------------------------------------------------------------------------------------------------

    def batch(self) -> list[Incoming]:
        """Return what goes as one prompt: commands alone, everything else up to the next command.  The lock is held."""
        texts = itertools.takewhile(lambda incoming: not incoming.command, self.waiting)
        return list(texts) or list(self.waiting)[:1]

    def _next_job(self) -> Optional[Incoming]:
        """Return what is next, if that is no prompt.  The lock is held."""
        return self.waiting[0] if self.waiting and self.waiting[0].command in JOBS else None

    def move(self, batch: list[Incoming], turn: Turn) -> None:
        """Make the messages that wait longest the turn's.  The lock is held."""
        turn.messages = [self.waiting.popleft() for _ in batch]

    # -- events --------------------------------------------------------------------------------------------------------

    def pump(self, until: float) -> None:
        """Handle what has happened, and send a frame when one is due; return after something happened, or at `until`."""
        wake_at = min(until, self.turn.refresh() if self.turn else math.inf, time.monotonic() + LOOK_SECONDS)
        try:
            self._events.get(timeout=max(wake_at - time.monotonic(), 0))()
            while True:
                self._events.get_nowait()()
        except queue.Empty:
            pass
        if self.turn and time.monotonic() > wake_at + FROZEN_GAP:
            self.turn.quiet_since = time.monotonic()
        if self.bot.closing.is_set():
            raise Closing

    def wait(self, until: float) -> None:
        """Pump before there is a prompt.  Raises Stopped, also when a job is next, which a warm start must not keep waiting."""
        self.pump(until)
        with self.lock:
            if self.turn:
                self.turn.check_stop()
            if self._next_job() and not self.turn.messages:
                raise Stopped

    def aside(self, work: Callable[[], Any]) -> Any:
        """Do something that takes its time as an errand, while draft and Stop go on; return its result."""
        outcome: Future = Future()
        outcome.add_done_callback(lambda _: self.post("wake"))

        def run() -> None:
            try:
                outcome.set_result(work())
            except Exception as error:   # handed on
                outcome.set_exception(error)

        self.bot.errand(outcome, run)
        while not outcome.done():
            self.wait(math.inf)
        return outcome.result()

    def _on_wake(self) -> None:
        """Something waits, was stopped, decided, granted or done; the loops see for themselves.  A message hides the draft."""
        if self.turn:
            self.turn.draft.hide()

    def _on_give_way(self, kiro: Kiro) -> None:
        if kiro is self.agent.kiro and kiro.kept_warm:
            self.agent.let_go()

    def _on_exit(self, kiro: Kiro) -> None:
        kiro.exit_noticed = True
        if kiro in self.agent.former:
            self.agent.former.remove(kiro)

    def _on_response(self, kiro: Kiro, frame: dict) -> None:
        kiro.responses[frame["id"]] = frame

    def _on_question(self, kiro: Kiro, method: str, request_id: Any, params: dict) -> None:
        question = Question(kiro, method, request_id, params)
        if kiro is self.agent.kiro and self.turn and self.turn.phase is Phase.ASKED:
            self.turn.take(question)
        else:
            question.go_on(question.cancelled)

    def _on_notification(self, kiro: Kiro, method: str, params: dict) -> None:
        """Something between a prompt and its response, or an extension of Kiro's at any time."""
        try:
            if kiro is self.agent.kiro and self.turn:
                self.turn.hear(method, params)
            self.agent.hear(kiro, method, params)
            self.notes.hear(method, params)
            if method.endswith("/mcp/oauth_request") and len(kiro.sign_ins) < SIGN_INS_AT_MOST:
                kiro.sign_ins.setdefault((str(params.get("serverName")), str(params.get("oauthUrl"))), False)
                self._tell_sign_ins()
        except Exception:   # in a form that nobody expects; it ends nothing
            log.exception("A notification of Kiro's can't be understood: %s %.500s", method, params)

    def _tell_sign_ins(self) -> None:
        """Say where Kiro's servers want a sign-in, each once; while nobody waits for Kiro nothing, for the phone would ring."""
        kiro = self.agent.kiro
        for (server, url), told in kiro.sign_ins.items() if kiro and self.turn else ():
            if not told:
                host, kiro.sign_ins[server, url] = host_of(url), True
                text = f"The MCP server {server} wants you to sign in at {host or 'an odd address'}:\n{url}"
                buttons = [[(f"Sign in at {host}", {"url": url})]] if host else []
                self.bot.tell(self.key, counted(text) + SIGN_IN_HINT, buttons)

    def _on_give_up(self) -> None:
        self.delivery.give_up()

    # -- the end of a turn ---------------------------------------------------------------------------------------------

    def _conclude(self, turn: Turn, outcome: Outcome) -> None:
        """Journal the answer, then send it part by part."""
        turn.end()
        self.agent.known.charge(turn.answer.credits)
        self.agent.let_go()                    # a stop may have left it; Telegram may keep us for hours
        seconds = time.monotonic() - turn.began
        parts = turn.answer.parts(outcome, self.notes.take(), [self.agent.known.nearly_full()], seconds)
        try:
            if turn.turn_id is None:
                with self.lock:
                    if not turn.messages:      # else they were taken, and could not be journaled
                        self.move(turn.meant(self.batch()), turn)
                turn.turn_id = self.store.begin(*self.key, [m.update_id for m in turn.messages])
            self.store.answer(turn.turn_id, [json.dumps(part) for part in parts], outcome.offer)
        except StoreError as error:
            log.error("An answer can't be journaled and is sent all the same: %s", error)
        self.changes = {turn.turn_id: turn.answer.changes()}
        self.delivery.send(Outgoing(turn.turn_id, deque(enumerate(parts)), outcome.offer))
        log.info("Turn of %s/%s: %.1f s, %s", *self.key, seconds, outcome.remark.partition("\n")[0] or "done")
        if turn.messages and not turn.messages[0].command:
            self._note_title(title_of(words(turn.messages[0].message)))

    def _note_title(self, title: str) -> None:
        """Remember what the session is about, for /sessions; a topic that nobody has named gets a title, once."""
        self.bot.note(self.store.note_used, *self.key, title)
        title = title_of(self.agent.known.title) or title
        if title and (name := self.implicit_name):
            self.implicit_name = ""
            if title != name:
                self.bot.errand(("title", self.key), self.chat.rename, title)

    def _recover(self) -> None:
        """Finish a former run's turn: send what is missing, or offer what was cut off; never run it again unasked."""
        with self.lock:
            unfinished = self.unfinished.popleft()
        turn_id, begun = unfinished.turn_id, unfinished.state == "begun"
        try:
            if begun:
                self.store.answer(turn_id, [json.dumps(part) for part in self.delivery.card(unfinished)], offer=True)
            parts = deque((position, json.loads(body)) for position, body in self.store.parts(turn_id))
        except StoreError:
            with self.lock:
                self.unfinished.appendleft(unfinished)
            raise
        self.delivery.send(Outgoing(turn_id, parts, unfinished.offer or begun, former=not begun))


TROUBLE = {"agent/not_found": "Kiro has no agent {requestedAgent!r} and uses {fallbackAgent!r}.",
           "agent/config_error": "Kiro can't read an agent's configuration: {error}",
           "mcp/server_init_failure": "ℹ️ The MCP server {serverName} could not be started: {error}"}


class Notes:
    """What is to be said with the topic's next answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._said: set[str] = set()           # subjects of which once is enough

    def add(self, text: str, subject: str = "") -> None:
        """Say this; of a subject only the first, since each new process tells it again."""
        if text not in self._texts and not (subject and subject in self._said):
            self._texts.append(text)
            self._said.add(subject)

    def take(self) -> str:
        """Return what there is to say, and forget it."""
        texts, self._texts = self._texts, []
        return "\n".join(texts)

    def hear(self, method: str, params: dict) -> None:
        """Take in what Kiro tells of its agents and servers [acp 3.8]."""
        name, server = method.partition("/")[2], str(params.get("serverName"))
        if name in TROUBLE:
            text = TROUBLE[name].format_map(defaultdict(lambda: json.dumps(params), params))
            log.warning("%s", text)
            self.add(text, subject=server if "serverName" in params else text)
        elif name == "mcp/server_initialized":
            self._said.discard(server)


# -- jobs: what takes its place in the queue and is no prompt ------------------------------------------------------------

def run_job(conversation: Conversation, incoming: Incoming) -> None:
    """Do it, and say what came of it."""
    agent, text, buttons, done = conversation.agent, "⏹ Stopped.", [], False
    try:
        text, buttons = JOBS[incoming.command](conversation, incoming.argument)
        done = conversation.turn.phase is not Phase.STOPPING
    except Stopped:
        agent.let_go()                         # it may be in another folder, with another session
    except KiroFailure as failure:
        agent.let_go(at_once=True)
        text = f"⚠️ {failure}{agent.advice(failure)}"
    rest = incoming.argument if incoming.command == "new" else ""      # "/new do this": the rest is a message
    if rest and not done:
        text += "\nThe rest of your message was not sent to Kiro."
    conversation.turn.end()
    if conversation.bot.places.in_demand():    # Telegram may keep us waiting now
        agent.let_go()
    try:
        if text:
            conversation.chat.say("\n".join(filter(None, [conversation.notes.take(), text])), buttons)
    except TelegramError as error:             # it is done all the same: /new must not be done again at the next start
        log.error("What became of /%s of %s/%s can't be said: %s", incoming.command, *conversation.key, error)
    if rest and done:
        rest = words(incoming.message).split(maxsplit=1)[1]
        incoming.command, incoming.message = "", {**incoming.message, "text": rest, "entities": []}
        with conversation.lock:
            return conversation.waiting.appendleft(incoming)
    conversation.bot.note(conversation.store.done, incoming.update_id)     # or it would be done again at the next start


def begin_session(conversation: Conversation, folder: str = "", session: Optional[UsedSession] = None) -> Said:
    """Make a session now, not with the next message, or go on with this one; offer the way back."""
    back = session_button(conversation, "sessions", "Back to the former session")
    conversation.turn.doing = "Opening the session…" if session else "Starting a new session…"
    kiro = conversation.agent.begin_anew(folder, session)
    how = f"✨ Going on with “{session.title}”." if session else "✨ A new session has begun."
    return f"{how} Model: {conversation.agent.model()}. Folder: {kiro.workspace}", back


def choose_folder(conversation: Conversation, wanted: str) -> Said:
    """Answer /folder: show where the topic works, or begin a session in another folder."""
    record, settings, folders = conversation.agent.record(), conversation.bot.settings, offered_folders(conversation)
    named = [path for path in folders if wanted in (path, key_of(path), os.path.basename(path))]
    below = [root / wanted for root in settings.allowed_folders if wanted]     # or absolute
    found = named or sorted({os.path.realpath(path) for path in below if is_allowed(path, settings)})
    if len(found) == 1 and found[0] != record.workspace_path:
        return begin_session(conversation, found[0])
    text = f"Which {wanted}?" if len(found) > 1 else f"This topic works in {record.workspace_path}."
    if wanted and not found:                   # of a new topic, it is just a name
        is_name = "forum_topic_created" in conversation.turn.messages[0].message
        text = "" if is_name else f"⚠️ {FolderRefused(wanted, settings)}"
    elif not settings.allowed_folders:
        text += NO_FOLDERS
    return text, choices(conversation, "folder", folders.items(), record.workspace_path)


def offered_folders(conversation: Conversation) -> dict[str, str]:
    """Return the folders that are offered, with labels: the topic's own, the allowed ones and those directly below."""
    settings = conversation.bot.settings
    found = {path for root in settings.allowed_folders for path in (root, *root.glob("[!.]*"))}
    offered = itertools.islice((str(path) for path in sorted(found) if is_allowed(path, settings)), FOLDERS_SHOWN)
    return {conversation.agent.default_workspace(): "This topic's own folder", **{path: path[-60:] for path in offered}}


def choose_session(conversation: Conversation, wanted: str) -> Said:
    """Answer /sessions: list those of the topic's folder, or go on with one of them, or one that the topic had elsewhere."""
    record, conversation.turn.doing = conversation.agent.record(), "Asking Kiro for its sessions…"
    sessions = offered_sessions(conversation)
    session_id = chosen(wanted, sessions)
    if session_id and session_id != record.session_id:
        owner = conversation.store.owner(session_id)
        if owner is None:
            return begin_session(conversation, sessions[session_id].folder, sessions[session_id])
        return f"Another topic has that session: {owner[1] if owner[0] == record.user_id else 'one of somebody else'}", []
    shown = [(s.session_id, f"{s.title} · {age(s.used_at)}") for s in sessions.values() if s.folder == record.workspace_path]
    return ("There is no such session here." if wanted and not session_id else f"Sessions in {record.workspace_path}:",
            choices(conversation, "sessions", shown[:SESSIONS_SHOWN], record.session_id)
            + session_button(conversation, "terminal", IN_TERMINAL))


def offered_sessions(conversation: Conversation) -> dict[str, UsedSession]:
    """Return the sessions that Kiro lists for the folder, in either dialect [acp 3.8, 11], and those that the topic had; by
    id, the last used first."""
    agent, kiro = conversation.agent, conversation.agent.started()
    sessions = [UsedSession(*row) for row in conversation.store.used_sessions(*conversation.key)]
    announced = "list" in kiro.agent.get("agentCapabilities", {}).get("sessionCapabilities", {})
    method = "_kiro.dev/session/list" if is_kiro(conversation.bot.settings) else "session/list" if announced else ""
    try:
        result = agent.request(kiro, method, {"cwd": kiro.workspace}, LIST_SECONDS) if method else {}
        sessions += [UsedSession(str(s["sessionId"]), kiro.workspace, title_of(s.get("title") or "") or str(s["sessionId"]),
                                 str(s.get("updatedAt") or ""))
                     for s in result.get("sessions", ()) if s.get("cwd", kiro.workspace) == kiro.workspace]
    except (KiroFailure, TypeError, KeyError, AttributeError) as error:
        log.warning("Kiro's sessions can't be listed: %r", error)
    by_id = {session.session_id: session for session in sessions}      # Kiro's titles are the better ones
    return dict(sorted(by_id.items(), key=lambda item: item[1].used_at, reverse=True))


def leave_to_terminal(conversation: Conversation, _: str) -> Said:
    """Answer /terminal: the next message takes the session back."""
    agent, settings = conversation.agent, conversation.bot.settings
    agent.let_go()
    agent.await_former()
    record = agent.record()
    line = record.session_id or "none yet"
    if is_kiro(settings):
        command = ["chat" if word == "acp" else word for word in settings.kiro_command]
        line = f"cd {shlex.quote(record.workspace_path)} && {shlex.join([*command, '--resume-id', line])}"
    copy = [[("Copy", {"copy_text": types.CopyTextButton(line)})]] if len(line) <= COPY_LIMIT else []
    return f"The session is free for a terminal on the server:\n\n{line}\n\nLeave it there before you write here.", copy


def ask_for_models(conversation: Conversation, wanted: str) -> Said:
    """Answer /model when Kiro has not told its models yet."""
    conversation.turn.doing = "Asking Kiro for its models…"
    conversation.agent.ready()
    return answer_model(conversation, wanted)


JOBS = {"new": lambda conversation, _: begin_session(conversation), "model": ask_for_models, "folder": choose_folder,
        "sessions": choose_session, "terminal": leave_to_terminal}     # by command


# ======================================================================================================================
# Turn: from taking messages to what comes of them
# ======================================================================================================================

KEEP_ALIVE_SECONDS = 20         # a draft lives for 30 seconds [tg 1.1]
DEAF_SECONDS = 20               # for a request to be read from the pipe
TURN_GLANCE_SECONDS = 0.5       # between two looks at the clocks of a turn
STOP_SECONDS = 5                # for Kiro to obey a cancel; 2.3 were seen [acp 3.7]
AFTERWORD_SECONDS = 1           # for the response after a `turn_end`
INTERRUPTED_SECONDS = 3         # for the response after INTERRUPTED, which never comes [acp 4.4]
INTERRUPTED = "Tool uses were interrupted, waiting for the next user prompt"
TOOL_PATIENCE = 6               # times SILENCE_SECONDS while a tool is running
PERMISSION_SECONDS = 30 * 60
PERMISSION_SECONDS_IN_DEMAND = 2 * 60    # while another topic waits for a place
ASK_RETRY_SECONDS = 5
QUESTION_LIMIT = 20_000         # UTF-16 units; room for the outcome must remain
ARGUMENT_LIMIT = 3000           # characters of one argument of a tool call in a question
Script = Generator[tuple[str, list[tuple], bool], Any, dict]     # of a question
ROW_LENGTH = 30                 # characters of the labels of buttons that stand in one row
STYLES = {"allow_once": "success", "allow_always": None, "reject_once": "danger", "reject_always": "danger"}    # in order
NUMBER_AT_MOST = 1e15
WRITTEN = {"string": "a text", "integer": "a whole number", "number": "a number"}
LIMITS = {"minimum": "from {}", "maximum": "up to {}",
          "minLength": "at least {} characters", "maxLength": "at most {} characters",
          "pattern": "of the form {}", "format": "of the form {}"}
SECRET = re.compile(r"passw|passphrase|secret|token|credential|key(?![a-z])", re.I)     # what this chat is no place for
HTTPS = re.compile(r"https://([a-z0-9-]+(?:\.[a-z0-9-]+)+)(?::\d{1,5})?(?:[/?#][!-~]{0,2000})?", re.I)
ANSWER_AT_MOST = 8 * 1024 * 1024         # characters; more is no answer but an accident
TOOLS_KEPT = 100                # calls whose end was not told
PLAN_WIDTH, PLAN_LENGTH = 80, 12         # characters of an entry, entries that /status shows
PLAN_SIGNS = {"completed": "☑", "in_progress": "▸"}
TIME_SHOWN_AFTER = 10           # seconds
CHANGES_AT_MOST = 2 * 1024 * 1024        # characters
OLD, NEW = "\n- ", "\n+ "
LONG_SECONDS = 30               # a turn that takes longer says so
NOTHING_SAID = "Kiro has finished without saying anything."
STOP_REASONS = {"cancelled": "ℹ️ Kiro ended this turn early (cancelled).",
                "refusal": "ℹ️ Kiro declined to go on (refusal).",
                "max_tokens": "ℹ️ The answer was cut off: the model's token limit.",
                "max_turn_requests": "ℹ️ Kiro stopped: too many steps in one turn. Write “go on” to continue."}


class Stopped(Exception):
    """The user has stopped the turn."""


class Phase(Enum):
    """Where a turn is; it is over when Kiro is done with it, although its answer may still have to be sent.

        WAITING ─▶ ASKED ─▶ OVER        back from ASKED to WAITING: a process failed before it said anything
           └─▶ STOPPING ◀─┘  ▲          (from both to STOPPING: the user has stopped it)
                  └──────────┘

    It changes under the conversation's lock; to STOPPING on any thread, else on the conversation's own.
    """
    WAITING, ASKED, STOPPING, OVER = range(4)


class Outcome(NamedTuple):
    """How a turn has ended."""
    remark: str = ""            # to be said after the answer
    offer: bool = False         # whether to do it again is for the user to say
    stopped: bool = False       # the remark is the end of what was said


class Turn:
    """One run, from messages to an outcome.  All but `stop` runs on the conversation's thread."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation, self._agent = conversation, conversation.agent
        self._questions, self._settings = conversation.bot.questions, conversation.bot.settings
        self.phase = Phase.WAITING
        self.draft, self.answer = Draft(conversation.chat), Answer()
        self.doing = "Thinking…"               # what the draft says while Kiro says nothing
        self.began = time.monotonic()
        self.arrived = conversation.waiting[0].arrived
        self.messages: list[Incoming] = []     # taken, not waiting any more
        self.turn_id: Optional[int] = None     # the journal's, once begun
        self.quiet_since = self.began          # when the clock of silence was set anew; under the questions' lock, too
        self.awaits_store = False              # the database failed before it began, and the user knows
        self._prompt: list[dict] = []          # as ACP content blocks
        self._caught = 0                       # how many messages waited at a stop: it means them, not later ones
        self._cancelled_at: Optional[float] = None   # when Kiro was told of the stop
        self._end_by = math.inf                # the response is not expected after this

    def stop(self, waiting: int) -> None:
        """The user has stopped it, while so many messages waited.  The conversation's lock is held."""
        self.phase, self._caught = Phase.STOPPING, waiting          # WAITING, ASKED -> STOPPING

    def check_stop(self) -> None:
        """Raise Stopped if it was stopped."""
        if self.phase is Phase.STOPPING:
            raise Stopped

    def meant(self, batch: list[Incoming]) -> list[Incoming]:
        """Return the waiting messages that a turn ends without Kiro: a stop means those that were there."""
        return batch[:self._caught or None]

    def end(self) -> None:
        """Kiro is done with it."""
        with self.conversation.lock:
            self.phase = Phase.OVER            # WAITING, ASKED, STOPPING -> OVER
        self._questions.refuse_all(self, "the turn is over")

    def hear(self, method: str, params: dict) -> None:
        """Take in a notification."""
        self.answer.hear(method, params)
        grace = self.answer.grace
        self._end_by = math.inf if grace is None else min(self._end_by, time.monotonic() + grace)

    def take(self, question: Question) -> None:
        """Ask this question, unless it answers itself."""
        self.answer.heard, question.turn = True, self
        self._questions.add(question)

    # -- what is shown -------------------------------------------------------------------------------------------------

    def refresh(self) -> float:
        """Send the next frame if it is due; return when to look again."""
        if self.phase is Phase.OVER:
            return math.inf
        return self.draft.refresh(self.answer, self._doing_now(), self._time())

    def status(self) -> str:
        """Return what goes on, with the time."""
        return f"{self._doing_now() or 'Kiro is writing'}{self._time()}"

    def _time(self) -> str:
        seconds = time.monotonic() - self.began
        return f" · {duration(seconds)}" if seconds >= TIME_SHOWN_AFTER else ""

    def _doing_now(self) -> str:
        """Return what Kiro does or what it waits for, and how far it is; without the time, which would always be news."""
        return " · ".join(filter(None, [self._activity(), *self.answer.progress()]))

    def _activity(self) -> str:
        if self.phase is Phase.OVER:
            return "Kiro is done; its answer is being sent"
        if self.phase is Phase.STOPPING:
            return "⏹ Stopping…"
        if self._questions.of(self):
            return "❓ Waiting for your decision"
        if self.answer.running:
            return f"🔧 {self.answer.running}"
        return self.answer.trouble or ("" if self.answer.length else self._agent.start_line() or self.doing)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Optional[Outcome]:
        """Bring the waiting messages to Kiro and hear it out; None: they were taken back.  Raises Closing, and StoreError when
        it has not begun."""
        try:
            return self._ask_or_again()
        except Stopped:
            if self.turn_id is not None:
                return Outcome("⏹ Stopped.", stopped=True)
            if not (self.messages or self._caught):
                return None
            return Outcome("⏹ Stopped before Kiro began.", offer=True, stopped=True)
        except KiroFailure as failure:
            if isinstance(failure, FolderRefused):
                key = self.conversation.key
                self.conversation.bot.errand(key, self.conversation.bot.say_as, *key, "/folder")     # where else?
            return Outcome(f"⚠️ {failure}{self._agent.advice(failure)}", offer=True)
        except Exception as error:   # a bug: it must not cost what Kiro has said, nor the message
            if self.conversation.bot.closing.is_set() or isinstance(error, StoreError) and self.turn_id is None:
                raise
            log.error("A turn of %s/%s: %r", *self.conversation.key, error, exc_info=not isinstance(error, StoreError))
            self._agent.let_go(at_once=True)
            return Outcome(f"⚠️ Something went wrong here: {error}.", offer=True)

    def _ask_or_again(self) -> Outcome:
        """Ask Kiro; a process that fails before it said anything is replaced once."""
        warm, is_second = self._agent.kiro, False
        while True:
            try:
                return self._ask()
            except KiroFailure as failure:
                used, is_refusal = self._agent.kiro, isinstance(failure, KiroRefusal)
                self._agent.let_go(at_once=not is_refusal)
                outlived_login = used is warm and is_refusal and is_login(failure)
                with self.conversation.lock:
                    self.check_stop()
                    if is_second or self.answer.heard or not (failure.again or outlived_login):
                        raise
                    self.phase, is_second = Phase.WAITING, True        # ASKED -> WAITING
                log.warning("Once more for %s/%s: %s", *self.conversation.key, failure)

    def _ask(self) -> Outcome:
        """Get a process, send the prompt, listen."""
        kiro, store = self._agent.ready(), self.conversation.store
        if self.turn_id is None:
            self._take(kiro)
            self.turn_id = store.begin(*self.conversation.key, [m.update_id for m in self.messages])
        is_prompt = not self.messages[0].command
        if is_prompt:
            self.conversation.delivery.unsent.clear()  # Kiro hears of them now
        lesson = self._agent.lesson(wanted=is_prompt)
        with self.conversation.lock:
            self.check_stop()                  # the last moment at which Kiro need not hear of it
            self.phase = Phase.ASKED           # WAITING -> ASKED
        request_id, self.quiet_since = kiro.prompt(self._prompt + lesson)
        return self._listen(kiro, request_id)

    def _take(self, kiro: Kiro) -> None:
        """Turn waiting messages into the prompt; wait a moment for the rest of an album or the like, unless something else has
        come."""
        conversation = self.conversation
        while True:
            with conversation.lock:
                self.check_stop()              # else something waits
                batch, newest = conversation.batch(), conversation.waiting[-1]
            until = newest.arrived + newest.patience
            if batch[-1] is newest and time.monotonic() < until:
                conversation.wait(until)
                continue
            self._prompt = self._compose(kiro, batch)
            with conversation.lock:
                self.check_stop()
                if batch == list(conversation.waiting)[:len(batch)]:     # else one was edited or taken back meanwhile
                    return conversation.move(batch, self)

    def _compose(self, kiro: Kiro, batch: list[Incoming]) -> list[dict]:
        """Return the messages as ACP content blocks; their files are downloaded first."""
        if batch[0].command:
            return [{"type": "text", "text": re.sub(r"^(/[\w-]+)@\w+", r"\1", words(batch[0].message))}]
        for incoming in batch:
            if incoming.files is None:
                incoming.files = [self._fetch(kiro, file) for file in files_of(incoming.message)]
        text = join_texts(batch)
        if text.startswith("/"):               # a caption for one: no command, but Kiro would take it for one
            text = f"[Message:]\n{text}"
        blocks = [{"type": "text", "text": text}]
        if unsent := self.conversation.delivery.unsent:
            blocks.append({"type": "text", "text": f"[From the bot: not sent to the user: {'; '.join(unsent)}]"})
        return blocks + (image_blocks(batch) if kiro.can("image") else [])

    def _fetch(self, kiro: Kiro, file: TelegramFile) -> Attachment:
        """Fetch a message's file into the workspace; one that can't be had is named."""
        if file.is_quoted and (path := upload_like(file, kiro.workspace)):
            return Attachment(path, file.is_image)
        try:
            chunks = self._attended(self.conversation.chat.download(file))
            path = self.conversation.aside(lambda: save(chunks, kiro.workspace, file.name))
        except (TelegramError, OSError) as error:
            reason = getattr(error, "description", None) or getattr(error, "strerror", None) or str(error)
            trouble = f"{harmless_name(file.name)}: {reason}"
            log.warning("A file of %s/%s could not be had: %s", *self.conversation.key, trouble)
            self.conversation.notes.add(f"⚠️ I could not get {trouble}")
            return Attachment("", False, f"[A file could not be had: {trouble}]")
        is_speech = file.is_speech and self._settings.transcribe_command
        return Attachment(path, file.is_image, self._transcribe(path, kiro.workspace) if is_speech else "")

    def _transcribe(self, path: str, workspace: str) -> str:
        """Return what is said in a voice note, and let the user see it; nothing when it could not be understood."""
        conversation, self.doing = self.conversation, "🎙 Listening…"
        try:
            text = conversation.aside(
                lambda: transcribe(path, workspace, self._settings, lambda: self.phase is not Phase.WAITING))
            shown = shortened(f"🎙 {text}", PLAIN_LIMIT // 2)
        except (OSError, ValueError) as error:
            trouble = getattr(error, "strerror", None) or str(error)
            log.warning("A voice note of %s/%s could not be understood: %s", *conversation.key, trouble)
            text, shown = "", f"🎙 The voice note could not be understood, so Kiro gets the file.\n{shortened(trouble, 200)}"
        conversation.bot.tell(conversation.key, shown)
        self.doing = "Thinking…"
        return text

    def _attended(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass a download on until the turn is stopped or the time is up.  Runs aside."""
        limit = time.monotonic() + DOWNLOAD_SECONDS
        for chunk in chunks:
            stopped = self.phase is not Phase.WAITING or self.conversation.bot.closing.is_set()
            if stopped or time.monotonic() > limit:
                raise Unreachable("it was stopped" if stopped else f"no end in {DOWNLOAD_SECONDS // 60} minutes")
            yield chunk

    def _listen(self, kiro: Kiro, request_id: int) -> Outcome:
        """Hear Kiro out.  The response ends the turn [acp 3.4]."""
        asked_at, self._end_by = self.quiet_since, math.inf
        while request_id not in kiro.responses:
            now = time.monotonic()
            if now >= self._end_by or kiro.exit_noticed and self._end_by < math.inf:
                log.info("No response after the end of a turn of %s/%s", *self.conversation.key)
                return self._ended(kiro, {})
            self._agent.check_alive(kiro, asked_at)
            self._obey_stop(kiro, now)
            self._watch_silence(kiro, now)
            self._questions.tend(self, now)
            self.conversation.pump(min(self._end_by, now + TURN_GLANCE_SECONDS))
        return self._ended(kiro, kiro.result(request_id))

    def _ended(self, kiro: Kiro, result: dict) -> Outcome:
        """Kiro is done with the turn: let its process go, note what is known of the session; return what there is to say."""
        self.end()
        kiro.turn_open = False
        self._agent.let_go()
        reason = str(result.get("stopReason"))
        self._agent.turn_ended(kiro, properly=reason == "end_turn")
        if self._cancelled_at is not None:
            raise Stopped
        return Outcome(STOP_REASONS.get(reason, ""), offer=reason == "cancelled")

    def _obey_stop(self, kiro: Kiro, now: float) -> None:
        """Pass a stop on to Kiro, and end a Kiro that does not obey."""
        if self.phase is not Phase.STOPPING:
            return
        if self._cancelled_at is None:
            self._cancelled_at = now
            self._questions.refuse_all(self, "stopped")
            kiro.cancel()
        if now >= self._cancelled_at + STOP_SECONDS:
            self._agent.let_go(at_once=True)
            raise Stopped

    def _watch_silence(self, kiro: Kiro, now: float) -> None:
        """End a Kiro that says nothing for too long."""
        patience = self._settings.silence_seconds * (TOOL_PATIENCE if self.answer.running else 1)
        is_silent = now >= max(kiro.heard_at, self.quiet_since) + patience and self._end_by == math.inf
        if is_silent and not self._questions.of(self):
            raise KiroFailure(f"Kiro said nothing for {patience:.0f} s, so I ended it.")


class Final(dict):
    """An answer to Kiro."""
    style: Optional[str] = None                # of its button


class Question:
    """What Kiro asks in a turn, in one message or in several, one after the other.

    Its script yields a text, choices (label, value) and whether the answer may be written; it gets the value of what
    was chosen, or what was written.  What it returns, or a value that is `Final`, is the answer.
    """

    def __init__(self, kiro: Kiro, method: str, request_id: Any, params: dict) -> None:
        self._kiro, self._request_id = kiro, request_id        # Kiro's, echoed as it came
        script, self.cancelled = QUESTIONS[method]             # at the end of the turn
        self._script, self.refusal = script(self, params), self.cancelled     # when nobody decides
        self.turn: Optional[Turn] = None       # whose it is, once it is put
        self.done = False                      # Kiro has its answer
        self.unsettled = ""                    # what became of a message that was answered while it was being sent

    def go_on(self, value: Any) -> None:
        """Answer Kiro, or ask what comes next."""
        if isinstance(value, Final):
            self._kiro.respond(self._request_id, value)
            self.done = True
            return
        try:
            self.text, self.choices, self.takes_text = self._script.send(value)
        except StopIteration as end:
            return self.go_on(end.value)
        self.token = THIS_RUN + secrets.token_hex(4)
        self.message_id: Optional[int] = None  # once it is in the topic; 0 while it is being sent
        self.asked_at = self.try_at = time.monotonic()     # when Kiro asked; when to try to ask the user (again)

    def buttons(self) -> Buttons:
        """Return the buttons, a few short ones in one row."""
        row = [(label, {"url": value} if isinstance(value, Link) else
                {"callback_data": f"ask:{self.token}:{n}", "style": getattr(value, "style", None)})
               for n, (label, value) in enumerate(self.choices)]
        return [row] if len(row) <= 3 and sum(len(label) for label, _ in row) <= ROW_LENGTH else [[button] for button in row]


def permission(question: Question, params: dict) -> Script:
    """Ask about a tool call; ids of options differ between versions, kinds do not [acp 3.6]."""
    of_kind: dict[str, Final] = {}
    options, choices = [option for option in map(as_dict, as_list(params.get("options"))) if "optionId" in option], []
    for option in sorted(options, key=lambda option: [*STYLES, option.get("kind")].index(option.get("kind"))):
        kind, answer = str(option.get("kind")), Final(outcome={"outcome": "selected", "optionId": option["optionId"]})
        answer.style = STYLES.get(kind)
        of_kind.setdefault(kind, answer)
        choices.append((str(option.get("name") or option["optionId"]), answer))
    question.refusal = of_kind.get("reject_once") or of_kind.get("reject_always") or question.cancelled
    is_choice = [option.get("kind") for option in options].count("allow_once") > 1      # rather than a permission
    if choices and (is_choice or question.turn.conversation.bot.settings.ask_permission):
        yield question.turn.answer.describe(as_dict(params.get("toolCall"))), choices, False
    return of_kind.get("allow_once") or of_kind.get("allow_always") or question.cancelled


def form(question: Question, params: dict) -> Script:
    """Ask what Kiro wants to know, field by field, or to open an address (ACP's elicitation); what several fields, or none,
    have got is shown before it goes.  What can't be asked is declined, with a word of why."""
    schema, url, content = as_dict(params.get("requestedSchema")), str(params.get("url")), {}
    fields = {name: {key: value for key, value in as_dict(field).items() if value is not None}
              for name, field in as_dict(schema.get("properties")).items()}
    fields = {name: field for name, field in fields.items()
              if name in as_list(schema.get("required")) or wanted(field) or choices_of(field)} or fields
    head = counted(f"❓ Kiro asks: {params.get('message')}")
    if why := obstacle(params.get("mode", "form"), url, fields):
        question.turn.conversation.notes.add(f"{head}\nI declined: {counted(why)}.")
        return DECLINE[1]
    if params.get("mode") == "url":
        yield (f"{head}\nIt wants you to open {host_of(url)}:\n{url}",
               [(f"Open {host_of(url)}", Link(url)), ("Done", Final(action="accept")), DECLINE], False)
    for name, field in fields.items():
        hint = wanted(field) and f"Your next message is the answer: {wanted(field)}."
        text = counted("\n".join(str(line) for line in (field.get("title") or name, field.get("description"), hint) if line))
        choices = choices_of(field) + [SKIP] * (name not in as_list(schema.get("required"))) + [DECLINE]
        value = yield f"{head}\n{text}", choices, bool(hint)
        while hint and value is not SKIP[1] and (value := value_of(field, value)) is None:
            value = yield f"⚠️ That does not fit.\n{text}", choices, True
        if value is not SKIP[1]:
            content[name] = value
    if len(fields) != 1:
        lines = [head, *(counted(f"{name}: {value}") for name, value in content.items())]
        yield "\n".join(lines), [("Send", Final(action="accept", content=content)), DECLINE], False
    return Final(action="accept", content=content)


def obstacle(mode: Any, url: str, fields: dict[str, dict]) -> str:
    """Return why it can't be asked, or nothing."""
    if mode == "url":
        return "" if host_of(url) else f"{url} is no plain https address"
    if any(SECRET.search(f"{name} {field.get('title')} {field.get('format')}") for name, field in fields.items()):
        return "this chat is no place for secrets; give it on the server"
    fits = mode == "form" and all(wanted(field) or choices_of(field) for field in fields.values())
    return "" if fits else "such a question can't be shown here"


def choices_of(field: dict) -> list[tuple[str, Any]]:
    """Return what there is to choose for a form's field, as (label, value)."""
    if field.get("type") == "boolean":
        return [("Yes", True), ("No", False)]
    options = as_list(field.get("oneOf") or field.get("anyOf") or field.get("enum"))
    options = [option if isinstance(option, dict) else {"const": option} for option in options]
    return [(str(option.get("title") or option.get("const")), option.get("const")) for option in options]


def wanted(field: dict) -> str:
    """Say what the person may write into a form's field; nothing where they can't.

    A pattern is told and not checked: somebody else's can take for ever, and hold the interpreter's lock meanwhile.
    """
    if field.get("type") == "array":
        labels = ", ".join(label for label, _ in choices_of(as_dict(field.get("items"))))
        return labels and f"one or more of {labels}, with commas between"
    kind = WRITTEN.get(str(field.get("type")))
    if not kind or choices_of(field):
        return ""
    return ", ".join([kind, *(form.format(field[name]) for name, form in LIMITS.items() if name in field)])


def value_of(field: dict, text: str) -> Any:
    """Return what was written as the field's value; None when it does not fit."""
    if field["type"] == "array":
        values = {label.lower(): value for label, value in choices_of(field["items"])}
        picked = [values.get(word.strip().lower()) for word in text.split(",")]
        return None if None in picked else picked
    try:
        value = {"integer": int, "number": float}.get(field["type"], str)(text)
        size, kind = (len(text), "Length") if value is text else (value, "imum")
        return value if field.get("min" + kind, -NUMBER_AT_MOST) <= size <= field.get("max" + kind, NUMBER_AT_MOST) else None
    except (ValueError, TypeError):      # not of this type, or limits that are none
        return None


def host_of(url: str) -> str:
    """Return the host of a plain https address, without a user in it; of any other nothing."""
    match = HTTPS.fullmatch(url)
    return match[1] if match else ""


QUESTIONS = {"session/request_permission": (permission, Final(outcome={"outcome": "cancelled"})),
             "elicitation/create": (form, Final(action="cancel"))}       # what Kiro may ask in a turn, and the answer of none
DECLINE, SKIP = ("Decline", Final(action="decline")), ("Skip", object())


class Questions:
    """The open questions of all turns.  Whoever takes one out of here has answered it.

    `decide` and `hear` run on errands and on the poll thread, everything else on the thread of the question's conversation.
    """

    def __init__(self, errand: Callable[..., None]) -> None:
        self._errand = errand
        self._open: list[Question] = []
        self._lock = threading.Lock()

    def add(self, question: Question) -> None:
        """Take in a question that is to be asked, unless it answers itself."""
        question.go_on(None)
        with self._lock:
            self._open += [question] * (not question.done)

    def of(self, turn: Turn) -> list[Question]:
        """Return a turn's open questions."""
        with self._lock:
            return [question for question in self._open if question.turn is turn]

    def decide(self, user_id: int, token: str, index: int, message_id: int) -> str:
        """Take a button for the answer; return what came of it, or nothing when that is over or somebody else's."""
        with self._lock:
            for question in self._open:
                if question.token == token and question.turn.conversation.key[0] == user_id and index < len(question.choices):
                    question.message_id = message_id
                    return self._close(question, *question.choices[index])
        return ""

    def hear(self, key: tuple[int, int], text: str) -> str:
        """Take what a person has written in the topic for the answer; return nothing when none is waited for."""
        with self._lock:
            for question in self._open if text else ():
                if question.takes_text and question.message_id is not None and question.turn.conversation.key == key:
                    return self._close(question, text, text)
        return ""

    def _close(self, question: Question, outcome: str, value: Any) -> str:
        """Go on from what is asked now, and say in its message what became of it; the clock of silence starts anew.
        Return that, or nothing when the turn is being stopped.  The lock is held."""
        turn, message_id, outcome = question.turn, question.message_id, f"→ {whole_characters(outcome)}"
        if turn.phase is Phase.STOPPING and value is not question.cancelled:
            return ""
        settled, turn.quiet_since = f"{question.text}\n\n{outcome}", time.monotonic()
        question.go_on(value)
        if question.done:
            self._open.remove(question)
        if message_id:
            self._errand(turn.conversation.key, turn.conversation.chat.settle, message_id, settled)
        else:
            question.unsettled = settled
        turn.conversation.post("wake")
        return outcome

    def tend(self, turn: Turn, now: float) -> None:
        """Ask what has not been asked, refuse what was not answered in time."""
        patience = PERMISSION_SECONDS_IN_DEMAND if turn.conversation.bot.places.in_demand() else PERMISSION_SECONDS
        for question in self.of(turn):
            if turn.phase is Phase.STOPPING:       # it must not wait until all are asked
                return
            if now >= question.asked_at + patience:
                self._refuse(question, f"nobody answered for {patience // 60:.0f} minutes", question.refusal)
            elif question.message_id is None and now >= question.try_at:
                self._ask(question)
                turn.draft.hide()

    def _ask(self, question: Question) -> None:
        """Put the question into the topic; when Telegram can't be reached, note when to try again."""
        conversation, token = question.turn.conversation, question.token
        question.message_id, question.unsettled = 0, ""
        try:
            message_id = conversation.chat.ask(question.text, question.buttons())
        except Refused as error:
            log.error("A question could not be asked: %s", error)
            self._refuse(question, "it could not be asked", question.refusal)
        except TelegramError as error:
            question.message_id, question.try_at = None, time.monotonic() + getattr(error, "seconds", ASK_RETRY_SECONDS)
        else:
            with self._lock:
                if question.token == token and not question.done:
                    question.message_id = message_id
                elif question.unsettled:
                    self._errand(conversation.key, conversation.chat.settle, message_id, question.unsettled)

    def _refuse(self, question: Question, why: str, answer: Final) -> None:
        with self._lock:
            if question in self._open:
                self._close(question, f"Refused: {why}.", answer)

    def refuse_all(self, turn: Turn, why: str) -> None:
        """Refuse whatever a turn asks that is over, or being stopped."""
        for question in self.of(turn):
            self._refuse(question, why, question.cancelled)


# ======================================================================================================================
# Prompt: what a message says to Kiro
# ======================================================================================================================

LESSON_START = "[About this chat, from the bot that brings you these messages:"       # agents take titles from prompts
LESSON = LESSON_START + """ the user reads your answers in Telegram on a \
phone, as Markdown. To send a file from the working directory, write <send_file path="relative/path">caption</send_file> in \
the answer itself, outside of any code; the tag is not shown. What you leave running in the background ends with your \
answer.]"""
UPLOADS = "uploads"
TRANSCRIBE_SECONDS = 120
TRANSCRIBE_GLANCE = 0.05        # seconds between two looks at it
TRANSCRIPT_AT_MOST = 100_000    # bytes
IMAGE_BYTES = 3_700_000         # of one image block [acp 7]
IMAGES_BYTES = 9_000_000        # of all image blocks of a prompt
IMAGES_AT_MOST = 10             # of a prompt [acp 7]
IMAGE_TYPES = re.compile(rb"(?P<png>\x89PNG\r\n)|(?P<jpeg>\xff\xd8\xff)|(?P<gif>GIF8)|(?P<webp>RIFF....WEBP)", re.S)
IMAGE_SIZES = re.compile(rb"\A\x89PNG.{12}(.{4})(.{4})|\xff[\xc0-\xc3\xc5-\xcf]\0[\x0b\x11\x14]\x08(..)(..)", re.S)
IMAGE_EDGE = 2000               # pixels; larger images can poison a session [acp 4.6]
NAME_LENGTHS = (80, 16)         # bytes of a saved file's name, and of its extension
DOWNLOAD_SECONDS = 15 * 60
DOWNLOAD_CHUNK = 64 * 1024
DOWNLOAD_LIMIT = 20 * 1024 * 1024       # of the official Bot API server [tg 4]
FILE_KINDS = ["photo", "animation", "document", "audio", "voice", "video", "video_note", "sticker"]   # one has a document too
DEFAULT_TYPES = {"photo": "image/jpeg", "video_note": "video/mp4", "sticker": "image/webp"}      # Telegram says no other
LINE_KINDS = ["venue", "location", "contact", "poll", "dice", "checklist"]      # a venue has a location too
TEXTS = {"summary": "", "text": "entities", "alternative_text": "", "button": "", "caption": "caption_entities", "credit": ""}
UNREAD = {"text": "(This could not be read.)"}     # in the place of a quote


class Attachment(NamedTuple):
    """A file that came with a message."""
    path: str                   # absolute, in the workspace; empty when it could not be had
    is_image: bool              # small enough to be shown to the model
    note: str = ""              # why it could not be had, or what was said in it


def transcribe(path: str, workspace: str, settings: Settings, stopped: Callable[[], bool]) -> str:
    """Return what the owner's command prints for a recording.  Raises OSError, and ValueError that says why there is none."""
    mark = secrets.token_hex(6)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([*settings.transcribe_command, path], cwd=workspace, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=err, start_new_session=True, env=child_environment(settings, mark))
        limit = time.monotonic() + TRANSCRIBE_SECONDS
        try:
            while process.poll() is None:
                if stopped() or time.monotonic() > limit or os.fstat(out.fileno()).st_size > TRANSCRIPT_AT_MOST:
                    raise ValueError("it was stopped" if stopped() else f"no end in {TRANSCRIBE_SECONDS} s, or too much of it")
                time.sleep(TRANSCRIBE_GLANCE)
        finally:
            end_processes(lambda: running(lambda pid: belongs(pid, mark, process.pid)), TERM_SECONDS)
            process.wait()
        text, trouble = (os.pread(file.fileno(), TRANSCRIPT_AT_MOST, 0).decode(errors="replace").strip() for file in (out, err))
        if process.returncode or not text:
            raise ValueError(trouble.splitlines()[-1] if trouble else f"exit status {process.returncode}, and no text")
        return text


def contents(message: dict) -> tuple[str, list[TelegramFile]]:
    """Return what a message itself brings: its words and its file."""
    return words(message), file_in(message)


def words(message: dict) -> str:
    """Return what the person wrote [tg 2.1], as Markdown; a place, a poll and the like as one line."""
    lines = [_inside({**message, **message.get("rich_message", {})}), message.get("sticker", {}).get("emoji", ""),
             *[f"[{kind}: {json.dumps(message[kind], ensure_ascii=False)}]" for kind in LINE_KINDS if kind in message][:1]]
    return "\n".join(filter(None, lines)).strip("\n")


def _marked(text: Any, entities: list[dict]) -> str:
    """Return a text with its entities as Markdown."""
    if not entities:
        return markdown(text)
    cells = [cell for c in text for cell in [c, ""][:1 + (c > "\uffff")]]      # one for each UTF-16 unit: so offsets count
    for span in sorted(entities, key=lambda span: (-span["offset"], span["length"])):      # the inner ones first
        start, stop = span["offset"], span["offset"] + span["length"]
        cells[start:stop] = [markdown({**span, "text": "".join(cells[start:stop])}), *[""] * (span["length"] - 1)]
    return "".join(cells)


def markdown(value: Any) -> str:
    """Return a rich text, or a block of it, as Markdown, as far as it matters to Kiro."""
    if isinstance(value, list):
        return "".join(map(markdown, value))
    if not isinstance(value, dict):
        return str(value)
    kind, text, url = value.get("type", ""), _inside(value), value.get("url")
    if "expression" in value:
        return f"${value['expression']}$"
    if kind in ("code", "pre"):
        ticks = "```" if kind == "pre" else "`"
        while ticks in text:
            ticks += "`"
        return f"\n{ticks}{value.get('language', '')}\n{text}\n{ticks}\n" if kind == "pre" else f"{ticks}{text}{ticks}"
    if kind.endswith("quote"):
        return f"\n{as_quote(text)}\n"
    return f"[{text}]({url})" if url and url != text else text


def _inside(value: dict) -> str:
    """Return what a message, a rich text or a block of it says, a line for each block, list item and row."""
    rows = [f"| {' | '.join(map(_inside, row))} |" for row in value.get("cells", [])]
    if rows:
        rows.insert(1, "|---" * len(value["cells"][0]) + "|")
    items = [f"{item.get('label', '-')} {_inside(item)}" for item in value.get("items", [])]
    texts = [_marked(value[name], value.get(entities, [])) for name, entities in TEXTS.items() if name in value]
    return "\n".join([*texts, *map(markdown, value.get("blocks", [])), *items, *rows])


def as_quote(text: str) -> str:
    """Return a text as a Markdown quote."""
    return "\n".join(f"> {line}" for line in text.splitlines())


def reply_in(message: dict) -> dict:
    """Return what the message replies to; not a topic's first message: clients put it there by themselves [tg 3.2]."""
    reply = message.get("reply_to_message", {})
    if reply.get("message_id", 0) == message.get("message_thread_id"):
        reply = {}
    return reply or message.get("external_reply", {})


def full_text(message: dict) -> str:
    """Return a message's words, below what it replies to and where it comes from."""
    reply, quote, forward = reply_in(message), message.get("quote"), message.get("forward_origin")
    lines = [f"[From {author(reply['origin'])}]" if "origin" in reply else "",
             _inside(quote) if quote else words(reply),
             *(f"[File {file.name}, {file.size} bytes]" for file in file_in(reply))]
    above = as_quote("\n".join(filter(None, lines)))
    said = (f"[Forwarded from {author(forward)}]\n" if forward else "") + words(message)
    return f"{above}\n\n{said}" if above else said


def author(origin: dict) -> str:
    """Return the name of whom a forward or a quote is from."""
    facts = {**origin, **next((value for value in origin.values() if isinstance(value, dict)), {})}
    return " ".join(filter(None, map(facts.get, ("title", "first_name", "last_name", "sender_user_name")))) or "somebody"


def join_texts(batch: list[Incoming]) -> str:
    """Join messages and the names of their files to one text; a pasted text that the client split is put together again."""
    text = last = ""
    for incoming in batch:
        message, lines = incoming.message, [full_text(incoming.message)]
        for attachment in incoming.files or ():
            lines += attachment.note, attachment.path and f"[File: {attachment.path}]"
        block = "\n".join(filter(None, lines))
        is_rest = len(last) >= SPLIT_TEXT_LENGTH and "forward_origin" not in message
        text += ("\n" if is_rest else "\n\n") * bool(text and block) + block
        last = message.get("text", "")
    return text


def image_blocks(batch: list[Incoming]) -> list[dict]:
    """Return the images as ACP blocks, as far as they fit into one prompt."""
    blocks, room = [], IMAGES_BYTES
    for path in (a.path for incoming in batch for a in incoming.files or () if a.is_image):
        with open(path, "rb") as file:
            data = file.read(IMAGE_BYTES + 1)
        mime_type = image_type(data)
        if mime_type and len(data) <= min(IMAGE_BYTES, room) and longer_edge(data) <= IMAGE_EDGE:
            room -= len(data)
            blocks.append({"type": "image", "mimeType": mime_type, "data": base64.b64encode(data).decode()})
    return blocks[:IMAGES_AT_MOST]


def image_type(data: bytes) -> str:
    """Return the MIME type of an image by its first bytes, or nothing."""
    match = IMAGE_TYPES.match(data)
    return f"image/{match.lastgroup}" if match else ""


def longer_edge(data: bytes) -> int:
    """Return the longest edge in pixels that a PNG or JPEG image speaks of, 0 when it is another kind."""
    return max((int.from_bytes(edge, "big") for size in IMAGE_SIZES.findall(data) for edge in size), default=0)


class TelegramFile(NamedTuple):
    """A file of a message: what Telegram tells of it."""
    file_id: str
    size: int                   # bytes; 0 when Telegram does not say
    name: str                   # the sender's, or one of ours
    is_image: bool
    is_speech: bool
    is_quoted: bool = False     # of the message that it replies to


def files_of(message: dict) -> list[TelegramFile]:
    """Return the message's file, and the one that it replies to."""
    return file_in(message) + [file._replace(is_quoted=True) for file in file_in(reply_in(message))]


def file_in(message: dict) -> list[TelegramFile]:
    """Return the file of a message, if there is one; of a photo the largest size that is not too large [acp 7]."""
    kind = next((kind for kind in FILE_KINDS if kind in message), "")
    media = message.get(kind) or {}
    if kind == "photo":
        media = ([p for p in media if max(p["width"], p["height"]) <= IMAGE_EDGE] or media[:1])[-1]
    if not media or media.get("is_animated") or media.get("is_video"):      # a sticker that no model can look at
        return []
    mime_type = media.get("mime_type") or DEFAULT_TYPES.get(kind, "")
    name = media.get("file_name") or f"{kind}_{message.get('message_id', '')}{mimetypes.guess_extension(mime_type) or ''}"
    is_image = kind == "sticker" or mime_type in ("image/png", "image/jpeg")
    return [TelegramFile(media["file_id"], media.get("file_size", 0), name, is_image, kind in ("voice", "video_note"))]


def upload_like(file: TelegramFile, workspace: str) -> str:
    """Return the path of an upload of this name and size, or nothing."""
    path = os.path.join(workspace, UPLOADS, harmless_name(file.name))
    return path if os.path.isfile(path) and os.path.getsize(path) == file.size else ""


def harmless_name(name: str) -> str:
    """Return a file name without path, control and direction-changing characters, never hidden, of bounded length."""
    name = "".join("_" if c in '/\\:*?"<>|;' or not c.isprintable() else c for c in name)
    parts = os.path.splitext(name.strip(" .-") or "file")
    return "".join(part.encode()[:length].decode(errors="ignore") for part, length in zip(parts, NAME_LENGTHS))


def save(chunks: Iterator[bytes], workspace: str, name: str) -> str:
    """Stream a file into the uploads under a temporary name, then give it a free one; return the path.  Raises OSError."""
    folder = Path(workspace, UPLOADS)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise OSError(0, f"{UPLOADS}/ is a link to another place")
    path = folder / harmless_name(name)
    temporary = folder / f".incoming-{path.name}"
    if not os.path.lexists(ignored := folder / ".gitignore"):
        ignored.write_text("*\n")              # no repository gets dirty
    temporary.unlink(missing_ok=True)          # of a run that was killed
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
        stem, n = path.stem, 1
        while os.path.lexists(path):
            n += 1
            path = path.with_stem(f"{stem}-{n}")
        return str(temporary.rename(path))
    finally:
        temporary.unlink(missing_ok=True)


# ======================================================================================================================
# Agent: a topic's hold on Kiro
# ======================================================================================================================

SESSION_SECONDS = 90            # how long Kiro may take [acp 10], each but for silence: SILENCE_SECONDS if that is less
MISSING_SECONDS = 10            # for the load of a session whose file is missing or empty; some versions never answer that
MODEL_SECONDS = 5
LOCK_SECONDS = 15
REQUEST_PATIENCE = 4            # times its seconds, for a request during which Kiro keeps talking
SLOW_START_SECONDS = 3          # after which the draft tells what Kiro said on stderr
REPLAY_SECONDS = 1.0            # for what some agents replay after their response to session/load
QUIET_SECONDS = 0.03            # a replay is over when nothing came for this long
FULL_CONTEXT = 80               # percent
COMMANDS_SHOWN, COMMAND_WIDTH = 20, 100
SAME_REFUSALS = 2               # so many turns refused in the same words are the session's fault
HISTORY_GONE = ("⚠️ Kiro no longer has this topic's session: its history is gone, a new one has begun. "
                "The folder is as it was. (The old session: {})")
NO_HISTORY = "ℹ️ This agent can't reload sessions: each message starts without the history."
LIST_SECONDS = 5
SESSIONS_SHOWN = 10
FOLDERS_SHOWN = 24
MODELS_SHOWN = 60               # buttons: Telegram takes 100, of 10 kB in all
PATH_SHOWN = 200                # characters of one that was refused
COPY_LIMIT = 256                # characters that a button can copy
NO_FOLDERS = " Whoever runs this bot can allow other folders with ALLOWED_FOLDERS."
NOTHING_KEPT = "ℹ️ Kiro kept nothing of what was said here before, so it starts afresh."


class KiroFailure(Exception):
    """Kiro could not do it; the text is for the user.  `again`: worth one more try with a fresh process."""

    code: Any = None               # of a JSON-RPC error
    ways: list = []                # to log in, as the agent told them
    agent = ""                     # its name, if it told

    def __init__(self, text: str, again: bool = False, said: str = "") -> None:
        super().__init__(text)
        self.again = again
        self.said = said or text   # all by which its kind is known


class KiroRefusal(KiroFailure):
    """A JSON-RPC error; Kiro itself is well."""

    def __init__(self, error: Any, agent: Optional[dict] = None) -> None:
        super().__init__(counted(error_text(error), ARGUMENT_LIMIT), said=str(error)[:QUESTION_LIMIT])
        self.code = as_dict(error).get("code")
        self.ways = as_dict(agent).get("authMethods", [])
        self.agent = str(as_dict(agent).get("agentInfo", {}).get("name") or "")


class KiroSilent(KiroFailure):
    """A request was not answered in time."""


class KiroLocked(KiroFailure):
    """Somebody else has the session."""


class FolderRefused(KiroFailure):
    """The topic can't work in that folder."""

    def __init__(self, path: str, settings: Settings) -> None:
        allowed = ", ".join(map(str, settings.allowed_folders)) or f"none.{NO_FOLDERS}"
        shown = one_line(path, PATH_SHOWN)
        super().__init__(f"{shown} is missing, can't be read, or is not among the allowed folders: {allowed}")


class NoPlace(Exception):
    """No process may be started or kept for this conversation now."""


class Places:
    """The right to have a Kiro process, MAX_PROCESSES times.  A free one goes to the waiting conversation whose user holds
    fewest; among equals first come, first served.

    Warm processes give way: whenever somebody queues, the one unused longest is asked to.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._held: Counter[int] = Counter()            # places, by user
        self._queue: dict[Conversation, float] = {}     # when what it waits for arrived
        self._warm: dict[Conversation, Kiro] = {}       # in order of last use
        self._lock = threading.Lock()

    def take(self, conversation: Conversation, arrived: Optional[float] = None) -> bool:
        """Take a place; False when there is none, or somebody who waits goes first.  What arrived waits then, and is woken
        whenever a place may be had."""
        with self._lock:
            if arrived and conversation not in self._queue:
                self._queue[conversation] = arrived
                if self._held.total() >= self.count:
                    self._ask_a_warm_one()
            if self._held.total() >= self.count or self._in_order()[:1] not in ([], [conversation]):
                return False
            self._held[conversation.key[0]] += 1
            if self._queue.pop(conversation, None):
                self._wake()                    # the others are a step further
            return True

    def ahead(self, conversation: Conversation) -> int:
        """Return how many of those that wait go before this one."""
        with self._lock:
            return self._in_order().index(conversation)

    def leave(self, conversation: Conversation) -> None:
        """Wait no longer."""
        with self._lock:
            if self._queue.pop(conversation, None):
                self._wake()

    def give_back(self, conversation: Conversation) -> None:
        """A process has gone."""
        with self._lock:
            self._held[conversation.key[0]] -= 1
            self._wake(1)

    def keep_warm(self, conversation: Conversation, kiro: Kiro) -> None:
        """This process is not in use; it may be asked to give way."""
        with self._lock:
            self._warm[conversation] = kiro
            if self._queue:
                self._ask_a_warm_one()

    def claim(self, conversation: Conversation) -> bool:
        """Use the warm process again; False when it has been asked to give way."""
        with self._lock:
            return self._warm.pop(conversation, None) is not None

    def in_demand(self) -> bool:
        """Does somebody wait for a place?"""
        return bool(self._queue)

    def _in_order(self) -> list[Conversation]:
        return sorted(self._queue, key=lambda waiting: (self._held[waiting.key[0]], self._queue[waiting]))

    def _wake(self, count: Optional[int] = None) -> None:
        for conversation in self._in_order()[:count]:
            conversation.post("wake")

    def _ask_a_warm_one(self) -> None:
        if self._warm:
            conversation = next(iter(self._warm))
            conversation.post("give_way", self._warm.pop(conversation))


class Known:
    """What Kiro and its answers have told of the present session."""

    def __init__(self) -> None:
        self.context: Optional[float] = None   # percent used
        self.credits: Optional[float] = None   # of the last turn
        self.spent = 0.0                       # in all turns since the bot knows the session
        self.title = ""                        # that Kiro gives the session
        self.full_told = False                 # that the context is nearly used up
        self.refusals: list[str] = []          # the last turns' errors, while they are the same

    def charge(self, credits: Optional[float]) -> None:
        """A turn has cost so much, if Kiro told."""
        self.credits = credits
        self.spent += credits or 0

    def nearly_full(self) -> str:
        """Return a remark when the context is nearly used up, once."""
        if self.context is None or self.context < FULL_CONTEXT or self.full_told:
            return ""
        self.full_told = True
        return f"ℹ️ {self.context:.0f} % of this session's context is used. /compact shortens it, /new starts afresh."


class Agent:
    """A topic's hold on Kiro: the process for this or the next turn, with the topic's session and model, and those that are
    still ending.

    On its conversation's thread only.  Of the conversation it uses `wait`, `post`, `notes` and `turn`.
    While it waits, events are handled, and one of them may take a warm process away: `check_alive` finds that out.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._bot, self._key = conversation, conversation.bot, conversation.key
        self._settings, self._store, self._places = self._bot.settings, self._bot.store, self._bot.places
        self.kiro: Optional[Kiro] = None
        self.former: list[Kiro] = []            # they may still hold the session's lock
        self.models: Optional[Models] = None    # what Kiro told last; replaced as a whole, so any thread may read it
        self.commands: list[str] = []           # Kiro's own, with what they do; replaced as a whole
        self.known = Known()
        self._lost = ""                         # a session that Kiro does not have any more
        self._refused = "", 0.0                 # how a session could not be loaded, and when

    # -- the process ---------------------------------------------------------------------------------------------------

    def ready(self) -> Kiro:
        """Return a process with the thread's session loaded and its model set; each step is done once.

        Raises KiroFailure, Stopped, Closing, and NoPlace when there is no turn that could wait for a place.
        """
        if self._conversation.turn:
            self._conversation.turn.check_stop()
        while True:
            kiro = self.started()
            if kiro.session_id or self._open_session(kiro):
                self._apply_model(kiro)
                return kiro
            self.let_go(at_once=True)

    def begin_anew(self, folder: str = "", session: Optional[UsedSession] = None) -> Kiro:
        """Return another process with another session, which is the thread's from now on: a new one, in another folder if one
        is given, or this one.  Raises as `ready`."""
        self.let_go()
        kiro = self.started(folder)
        if session is None:
            self._new_session(kiro)
        else:
            self._resume(kiro, session.session_id)
        try:
            self._apply_model(kiro)
        except Stopped:                   # too late: the session is the thread's
            pass
        return kiro

    def started(self, folder: str = "") -> Kiro:
        """Return a process that has answered `initialize`; a dead one is replaced, unnoticed."""
        if self.kiro is None or self.kiro.gone.is_set():
            self.let_go()
            self._start(folder)
        kiro = self.kiro
        if kiro.agent is None:
            kiro.agent = self.request(kiro, "initialize", INITIALIZE, self._settings.start_seconds)
        return kiro

    def start_line(self) -> str:
        """Return what a process whose start takes long said last on stderr: what it waits for, as a rule."""
        kiro = self.kiro
        if kiro is None or kiro.agent is not None or time.monotonic() < kiro.heard_at + SLOW_START_SECONDS:
            return ""
        return kiro.stderr.strip().rpartition("\n")[2]

    def _start(self, folder: str) -> None:
        """Start a process as soon as there is a place for it; wait for a Kiro that is just being replaced by another version.

        Raises KiroFailure, Stopped, Closing, NoPlace.
        """
        workspace, conversation, program = self.workspace(folder), self._conversation, self._settings.kiro_command[0]
        self._take_place()
        limit = time.monotonic() + REPLACED_SECONDS
        try:
            while self.kiro is None:
                try:
                    self.kiro = Kiro(conversation, workspace)
                except (OSError, ValueError) as error:
                    if getattr(error, "errno", None) not in REPLACED or time.monotonic() > limit:
                        reason = getattr(error, "strerror", None) or error
                        raise KiroFailure(f"Kiro could not be started: {reason} ({program}). "
                                          "Check KIRO_COMMAND on the server.") from error
                    conversation.wait(time.monotonic() + 0.2)
        except BaseException:
            self._places.give_back(conversation)
            raise
        if conversation.turn is None:
            self.offer_place()

    def _take_place(self) -> None:
        """Get the right to start a process.  Without a turn, only a place that nobody wants will do."""
        conversation, places = self._conversation, self._places
        if conversation.turn is None:
            if places.take(conversation):
                return
            self.await_former()        # which may free its place
        turn = conversation.turn        # one may have begun meanwhile
        if turn is None:
            if places.take(conversation):
                return
            raise NoPlace
        doing = turn.doing
        try:
            while not places.take(conversation, turn.arrived):
                ahead = places.ahead(conversation)
                turn.doing = f"Waiting for a free place, {ahead} ahead…" if ahead else "Waiting for a free place…"
                conversation.wait(math.inf)
        finally:
            places.leave(conversation)
        turn.doing = doing

    def offer_place(self) -> None:
        """The process is not in use, and may be asked to give way."""
        self.kiro.kept_warm = True
        self._places.keep_warm(self._conversation, self.kiro)

    def take_back(self) -> None:
        """Use the warm process again, unless it has been asked to give way."""
        if self.kiro and self.kiro.kept_warm and not self._places.claim(self._conversation):
            self.let_go()
        elif self.kiro:
            self.kiro.kept_warm = False

    def let_go(self, at_once: bool = False) -> None:
        """Let go of the process: it ends by itself, or is ended by its keeper."""
        kiro, self.kiro = self.kiro, None
        if kiro is None:
            return
        self._places.claim(self._conversation)
        kiro.kept_warm = False
        if not kiro.exit_noticed:
            self.former.append(kiro)
        kiro.end(patience=0 if at_once or kiro.agent is None else END_SECONDS)     # one that still starts holds no lock

    def await_former(self) -> None:
        """Wait until no former process holds the session's lock; their keepers see to it."""
        limit = time.monotonic() + END_SECONDS + 2 * TERM_SECONDS + LOCK_SECONDS
        while self.former:
            if time.monotonic() > limit:
                raise KiroFailure("The former Kiro process does not end. Ask whoever runs this bot to look at it.")
            self._conversation.wait(limit)

    def request(self, kiro: Kiro, method: str, params: dict, seconds: float) -> dict:
        """The one way to ask Kiro something: return the result.  Asking again goes on with the request in flight.

        Raises KiroFailure; NoPlace when the process was given away meanwhile.
        """
        if kiro.agent:                         # else it may wait in a cluster's queue
            seconds = min(seconds, self._settings.silence_seconds)
        if method not in kiro.in_flight:
            kiro.in_flight[method] = kiro.request(method, params)
        request_id, asked_at = kiro.in_flight[method]
        while request_id not in kiro.responses:
            self.check_alive(kiro, asked_at)
            limit = min(max(kiro.heard_at, asked_at) + seconds, asked_at + REQUEST_PATIENCE * seconds)
            if time.monotonic() >= limit:
                raise KiroSilent(f"Kiro did not answer {method} within {seconds:.0f} s.", again=True)
            self._conversation.wait(min(limit, time.monotonic() + 1))
        del kiro.in_flight[method]
        return kiro.result(request_id)

    def check_alive(self, kiro: Kiro, asked_at: float) -> None:
        """Raise if the process can't answer any more: given away, gone, or deaf."""
        if kiro is not self.kiro:
            raise NoPlace
        if kiro.exit_noticed:
            raise kiro.failure()
        patience = min(DEAF_SECONDS, self._settings.silence_seconds / 2)
        unread_for = time.monotonic() - max(asked_at, kiro.wrote_at)
        if kiro.agent and kiro.heard_at < asked_at and unread_for > patience and kiro.is_deaf():
            raise KiroFailure(f"Kiro does not read what it is sent (for {patience:g} s).", again=True)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def default_workspace(self) -> str:
        """Return the folder that a new thread gets: {WORKSPACE_BASE_PATH}/{user}/{thread}."""
        return str(self._settings.workspaces.joinpath(*map(str, self._key)))

    def record(self) -> SessionRecord:
        """Return the thread's row, or what it would be."""
        return self._store.get_session(*self._key) or SessionRecord(*self._key, "", self.default_workspace())

    def workspace(self, chosen: str = "") -> str:
        """Return the folder in which the thread works, or is to work.  Its default one is made when it is missing, and if it is
        there takes the place of a former default one, as when the bot's folder has moved.  Raises KiroFailure."""
        path, default = chosen or self.record().workspace_path, self.default_workspace()
        if Path(path).parts[-2:] != Path(default).parts[-2:]:
            if not is_allowed(path, self._settings):
                raise FolderRefused(path, self._settings)
            return os.path.realpath(path)
        try:
            if path != default and not os.path.isdir(path) and os.path.isdir(default):
                if not chosen:
                    self._store.upsert_session(*self._key, self.record().session_id, default, keep_model=True)
                path = default
            if path == default:
                os.makedirs(path, mode=0o700, exist_ok=True)
        except OSError as error:
            raise KiroFailure(f"The folder {path} can't be made: {error.strerror}.") from error
        if not os.path.isdir(path):
            raise KiroFailure(f"The folder {path} is no longer there.")
        return os.path.realpath(path)

    def _open_session(self, kiro: Kiro) -> bool:
        """Load the thread's session, or make one; return False when it is lost."""
        record, notes = self._store.get_session(*self._key), self._conversation.notes
        if record is None:
            return self._new_session(kiro)
        session_id, facts = record.session_id, self._store.get_facts(record.session_id)
        is_lost, self._lost = session_id == self._lost, ""
        if kiro.can("loadSession") and not is_lost:
            self.await_former()               # it has the lock, and may still be writing; so may an orphan
            if facts.ended or not is_empty(session_id) or lock_pid(session_id) is not None:
                return self._load_or_lose(kiro, record, facts)
        self._new_session(kiro)
        if facts.ended and is_lost:
            notes.add(NOTHING_KEPT if is_empty(session_id) else HISTORY_GONE.format(session_id))
        elif facts.ended:
            notes.add(NO_HISTORY, subject=NO_HISTORY)
        return True

    def _load_or_lose(self, kiro: Kiro, record: SessionRecord, facts: SessionFacts) -> bool:
        """Load the session; return False when it is lost."""
        try:
            return self._load_session(kiro, record, facts)
        except KiroFailure as failure:
            before = self._refused
            if same_words(before[0]) != same_words(failure.said):
                self._refused = failure.said, time.monotonic()
            if not session_is_lost(failure, record.session_id, facts, before):
                raise
            log.warning("Session %s of %s/%s is lost: %s", record.session_id, *self._key, failure)
            self._lost = record.session_id
            return False

    def _new_session(self, kiro: Kiro) -> bool:
        """Make a session for this thread; the chosen model stays."""
        result = self.request(kiro, "session/new", {"cwd": kiro.workspace, "mcpServers": []}, SESSION_SECONDS)
        session_id = result.get("sessionId")
        if not isinstance(session_id, str) or not session_id:
            raise KiroFailure("Kiro made no session: its answer to session/new has no sessionId.")
        return self._opened(kiro, session_id, result)

    def _resume(self, kiro: Kiro, session_id: str) -> None:
        """Load another session, which is the thread's from now on."""
        self.await_former()
        facts = self._store.get_facts(session_id)
        self._store.set_facts(session_id, *facts)      # or a new row would say that no turn of it has ended
        try:
            self._load_session(kiro, SessionRecord(*self._key, session_id, kiro.workspace), facts)
        except KiroRefusal as refusal:
            raise KiroFailure(f"Kiro no longer opens that session, so this topic stays in its own: {refusal}") from refusal

    def _load_session(self, kiro: Kiro, record: SessionRecord, facts: SessionFacts) -> bool:
        """Load the session, dealing with its lock; what Kiro replays is dropped at the door [acp 3.3]."""
        session_id = record.session_id
        params = {"sessionId": session_id, "cwd": record.workspace_path, "mcpServers": []}
        limit, pause, missing = time.monotonic() + LOCK_SECONDS, 0.25, has_vanished(session_id, facts)
        seconds = MISSING_SECONDS if missing or is_empty(session_id) else SESSION_SECONDS
        while True:
            try:
                result = self.request(kiro, "session/load", params, seconds)
                break
            except KiroRefusal as refusal:
                locked = LOCKED.search(refusal.said)
                if not locked:
                    raise
                settle_lock(int(locked[1]), session_id, self._settings, self._store)
                if time.monotonic() > limit:
                    raise KiroLocked(f"The session is still locked by process {locked[1]}. Try again in a minute. If nothing "
                                     f"uses it any more, remove {session_file(session_id, 'lock')} on the server, or begin "
                                     "another session with /new.") from refusal
            retry_at = time.monotonic() + pause
            while time.monotonic() < retry_at:
                self._conversation.wait(retry_at)
            pause = min(2 * pause, 2)
        self._let_replay_end(kiro)
        if missing and facts.ended and not kiro.replayed_before_response:      # some agents accept any id [acp 11]
            self._store.set_facts(session_id, ended=False, taught=False)
            self._conversation.notes.add(HISTORY_GONE.format(session_id))
        return self._opened(kiro, session_id, result)

    def _let_replay_end(self, kiro: Kiro) -> None:
        """Some agents replay after their response [acp 11]: wait for a moment of quiet, unless it came before."""
        limit = time.monotonic() + REPLAY_SECONDS
        while not kiro.replayed_before_response and time.monotonic() < min(kiro.heard_at + QUIET_SECONDS, limit):
            self._conversation.wait(min(kiro.heard_at + QUIET_SECONDS, limit))

    def _opened(self, kiro: Kiro, session_id: str, result: dict) -> bool:
        """Note what a session/new or session/load has told; the session is the thread's from now on, if it was not before.

        And whether the lock that Kiro has just taken names its process: only then do the pids in locks mean something here.
        """
        if session_id != self.record().session_id:
            self._store.upsert_session(*self._key, session_id, kiro.workspace, keep_model=True)
            self.known = Known()
        kiro.session_id, pid = session_id, lock_pid(session_id)
        kiro.models = models_of(result)
        self.models = kiro.models or self.models
        if pid is not None:
            kiro.lock_pid = pid if belongs(pid, kiro.mark, kiro.pid) else None
            self._store.set_note(LOCKS_BY_PID, "yes" if kiro.lock_pid else "")
        return True

    def _apply_model(self, kiro: Kiro) -> None:
        """Make Kiro use the model that somebody chose for this thread; where nobody did, it is told nothing."""
        wanted, models, notes = self._store.chosen_model(*self._key), self.models, self._conversation.notes
        if wanted is None or models is None or kiro.models and wanted == models.current:
            return
        if wanted not in self.model_names():
            self._store.set_model(*self._key, "auto", is_chosen=False)
            return notes.add(f"ℹ️ The model {wanted} is no longer offered; this topic is back to Kiro's own choice.")
        method, params = "session/set_model", {"modelId": wanted}
        if models.config_id is not None:
            method, params = "session/set_config_option", {"configId": models.config_id, "value": wanted}
        self.models = kiro.models = models._replace(current=wanted)
        try:
            self.request(kiro, method, {"sessionId": kiro.session_id, **params}, MODEL_SECONDS)
        except (KiroRefusal, KiroSilent) as failure:
            notes.add(f"⚠️ The model may not be {wanted}: {failure}")
        finally:
            kiro.in_flight.pop(method, None)           # after a stop too: the next choice is another request

    def model(self) -> str:
        """Return the thread's model: the one that was chosen, else what Kiro reported last."""
        return self._store.chosen_model(*self._key) or self.models and self.models.current or "auto"

    def model_names(self) -> list[str]:
        """Return the ids of the models that Kiro reported last."""
        return [name for name, _ in self.models.offered] if self.models else []

    # -- what is known of the session ----------------------------------------------------------------------------------

    def hear(self, kiro: Kiro, method: str, params: dict) -> None:
        """Take in what a notification says about the session [acp 3.8, 11]."""
        known, name, update, status = self.known, method.partition("/")[2], params.get("update", {}), params.get("status")
        kind, used, size = update.get("sessionUpdate"), finite(update.get("used")), finite(update.get("size"))
        if name == "metadata":
            percent = finite(params.get("contextUsagePercentage"))
            known.context = known.context if percent is None else percent
        elif name == "clear/status" or name == "compaction/status" and "completed" in (status, as_dict(status).get("type")):
            known.full_told = False
            self._note_facts(kiro, taught=False)
        elif name == "commands/available" or kind == "available_commands_update":
            self.commands = command_lines(params.get("commands") or update.get("availableCommands"))
        elif kind == "usage_update" and used is not None and size:
            known.context = 100 * used / size
        elif kind == "session_info_update":
            known.title = str(update.get("title") or known.title)

    def lesson(self, wanted: bool) -> list[dict]:
        """Return what tells Kiro of the tags, as content blocks for its next prompt; none where it knows them."""
        kiro = self.kiro
        kiro.knows_tags = self._store.get_facts(kiro.session_id).taught
        kiro.is_told = wanted and not kiro.knows_tags
        return [{"type": "text", "text": LESSON}] if kiro.is_told else []

    def turn_ended(self, kiro: Kiro, properly: bool) -> None:
        """A turn of the session has ended, by itself or not: it has a history, and may know the tags now."""
        self.known.refusals.clear()
        self._note_facts(kiro, taught=kiro.knows_tags or kiro.is_told and properly)

    def _note_facts(self, kiro: Kiro, taught: bool) -> None:
        """Note that the session has a history, and whether Kiro knows the tags; no reason to lose an answer."""
        kiro.knows_tags = kiro.is_told = False
        try:
            if kiro.session_id:
                self._store.set_facts(kiro.session_id, ended=True, taught=taught, in_sight=is_in_sight(kiro.session_id))
        except StoreError as error:
            log.error("What is known of a session can't be noted: %s", error)

    def advice(self, failure: KiroFailure) -> str:
        """Return what to do about it, when there is something more to say than to ask again."""
        if is_login(failure):
            return login_advice(failure, self._settings)
        if not isinstance(failure, KiroRefusal) or PASSING.search(failure.said):
            return ""
        same = same_words(str(failure))
        self.known.refusals = [r for r in self.known.refusals if r == same] + [same]
        if len(self.known.refusals) >= SAME_REFUSALS:
            return "\nThis session refuses every message in the same way. /new starts a fresh one, /compact may help too."
        return ""


# -- where a topic may work, and what it may go on with ---------------------------------------------------------------

class UsedSession(NamedTuple):
    """A session that a topic has or had, or that Kiro lists."""
    session_id: str
    folder: str
    title: str              # Kiro's, else the first words said in it
    used_at: str            # ISO 8601


def is_kiro(settings: Settings) -> bool:
    """Is the agent Kiro's own, as far as its name tells?"""
    return any(re.fullmatch(r"kiro(-cli.*)?", os.path.basename(word)) for word in settings.kiro_command)


def is_allowed(path: str | Path, settings: Settings) -> bool:
    """May a topic work there: in an allowed folder or below, links resolved, and not where bot and Kiro keep their own?"""
    try:
        real = Path(path).resolve()
        kept = settings.folder.resolve(), settings.workspaces, kiro_home().resolve()
        above = {real, *real.parents}
        return (not above.isdisjoint(settings.allowed_folders) and above.isdisjoint(kept)
                and not any(real in own.parents for own in kept) and real.is_dir() and os.access(real, os.R_OK | os.X_OK))
    except (OSError, ValueError, RuntimeError):     # a name too long, a NUL, half a character, links in a circle
        return False


def age(when: str) -> str:
    """Return how long ago that was."""
    try:
        hours = (time.time() - datetime.fromisoformat(f"{when[:19]}+00:00").timestamp()) / 3600
    except ValueError:
        return "?"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"


# ======================================================================================================================
# Kiro: one child process speaking ACP, and the locks on its sessions
# ======================================================================================================================

INITIALIZE = {"protocolVersion": 1, "clientInfo": {"name": "tg-acp", "version": "1"},
              "clientCapabilities": {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False,
                                     "elicitation": {"form": {}, "url": {}}}}
LINE_AT_MOST = 32 * 1024 * 1024
STDERR_KEPT = 4000              # characters
ERROR = re.compile("error", re.I)
COLOURS = re.compile(r"\x1b\[[\d;]*m")
STDERR_LINE_AT_MOST = 200       # of which the last two are told, each cut to so many characters
REPLACED_SECONDS = 3            # for a program that is being replaced to be there again
REPLACED = (errno.ENOENT, errno.EACCES, errno.ETXTBSY)
END_SECONDS = 5                 # from the end of stdin to TERM [acp 10]
TERM_SECONDS = 2                # from TERM to KILL
GLANCE_SECONDS, AT_EXIT_SECONDS = 0.5, 0.01     # how often to look whether it has exited: with, and without its stdout
WRITABLE = select.EPOLLOUT | select.EPOLLET     # told once, and once more after each `modify`
LOCKS_BY_PID = "Kiro's locks name processes that can be seen from here"
NO_SIGN = re.compile(r".{0,3}|-.*|proc|python[\d.]*")      # words of KIRO_COMMAND by which Kiro is not known
FOLDER_MARK, OWNER_MARK, PROCESS_MARK = "TG_ACP_BOT", "TG_ACP_OWNER", "TG_ACP_PROCESS"   # in our children's environment
NOT_LOGGED_IN = re.compile(r"not\s+logged\s+in|authentication required|unauthori[sz]ed|ExpiredToken|InvalidGrant|TokenExpired|"
                           r"AccessDenied", re.I)
PASSING = re.compile(r"throttl|too ?many ?requests|usage limit|timed out|rate.?limit|overloaded|high demand|quota|billing|"
                     r"\b(429|50\d)\b", re.I)     # another session would not help [acp 4.5, 11]
LOCKED = re.compile(r"active in another process \(PID (\d+)\)")
LOST = re.compile(r"session[^:;,]{0,80}(not found|does ?n.t exist|does not exist|unknown|no such|not exist)|"
                  r"(unknown|no such|invalid|missing) session|no session (with|by|for|of|named)|resource.not.found|"
                  r"no rollout found|thread not found",
                  re.I | re.S)
LOGIN_REQUIRED, RESOURCE_NOT_FOUND = -32000, -32002
REFUSED_AGAIN_SECONDS = 3       # between two refusals in the same words that count as two
SAYS_NOTHING = re.compile(r"\s*|internal error\.?", re.I)
HISTORY = {"user_message_chunk", "agent_message_chunk", "agent_thought_chunk", "tool_call", "tool_call_update"}   # a replay's
FRAME = {"method": str,
         "params": {"update": {"sessionUpdate": str, "toolCallId": str, "title": str, "kind": str, "status": str}},
         "result": {"stopReason": str, "agentInfo": {}, "authMethods": list, "sessions": list,
                    "agentCapabilities": {"promptCapabilities": {}, "sessionCapabilities": {}}}}


class Models(NamedTuple):
    """The models that Kiro reports for a session."""
    offered: list[tuple[str, str]]      # (id, label)
    current: str                        # id
    config_id: Optional[str]            # of session/set_config_option; None: session/set_model


class Process:
    """A child process and whatever that starts.  One thread, the keeper, does all that is to be done for them: it writes what
    is sent, hands lines to `_take`, keeps the end of stderr, and sees them to their end, which it tells by `_part`."""

    def __init__(self, mark: str, command: list[str], **how: Any) -> None:
        """Start it.  Raises OSError, ValueError."""
        self.mark = mark                         # in its environment
        self.wrote_at = time.monotonic()
        self.gone = threading.Event()            # the process and all it left behind have ended
        self.trouble = ""                        # why it had to be ended
        self.stderr = ""                         # the end of what it said there
        self._line = bytearray()                 # the beginning of one that has not ended yet
        self._outgoing = bytearray()
        self._stdin_ends = False                 # after that
        self._end_at = math.inf                  # when it is ended; 0: it has ended by itself
        self._epoll = select.epoll()
        self._work: dict[int, Callable[[], None]] = {}          # what to do when a descriptor is ready
        self._popen = subprocess.Popen(command, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, bufsize=0, **how)
        self.pid = self._popen.pid
        try:
            threading.Thread(target=self._keep, name=f"keeper of {self.pid}", daemon=True).start()
        except RuntimeError as error:            # no thread to be had: nobody would see to its end
            self._bury()
            raise OSError(0, str(error)) from error

    def send(self, data: bytes) -> None:
        """Have this written."""
        self._outgoing += data
        try:
            self._epoll.modify(self._popen.stdin, WRITABLE)      # wakes the keeper, now or when there is room
        except (OSError, ValueError):            # closed, or not registered yet
            pass

    def end(self, patience: Optional[float]) -> None:
        """Close stdin, which is the clean way [acp 4.1]; TERM after `patience` seconds, then KILL.  None: no signals."""
        if patience is not None:
            self._end_at = min(self._end_at, time.monotonic() + patience)
        self._stdin_ends = True
        self.send(b"")

    def is_deaf(self) -> bool:
        """Are there bytes in the pipe that it has not read?"""
        try:
            return any(fcntl.ioctl(self._popen.stdin, termios.FIONREAD, bytes(4)))
        except (OSError, ValueError):    # closed
            return False

    def how_it_ended(self) -> str:
        """Return the exit status, and the end of stderr."""
        if self.trouble:
            return self.trouble
        code = self._popen.returncode
        name = f"exit status {code}" if code >= 0 else f"signal {-code}"
        lines = (COLOURS.sub("", line).strip()[:STDERR_LINE_AT_MOST] for line in self.stderr.splitlines())
        said = [line for line in lines if line]
        last = said[-2:] if ERROR.search(" ".join(said[-2:])) else list(filter(ERROR.search, said))[-1:] or said[-2:]
        return f"{name}: {'; '.join(last)}" if last else name

    # -- on the keeper's thread ----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        popen = self._popen
        try:
            os.set_blocking(popen.stdin.fileno(), False)
            for pipe, events, work in ((popen.stdin, WRITABLE, self._write), (popen.stdout, select.EPOLLIN, self._read),
                                       (popen.stderr, select.EPOLLIN, self._drain)):
                self._epoll.register(pipe, events)
                self._work[pipe.fileno()] = work
            while (left := self._end_at - time.monotonic()) > 0:
                self._attend(left)
            end_processes(self.family, TERM_SECONDS, self._attend)
            for _ in range(64):                  # more than the pipes can hold of its last words
                self._attend(0)
            if self._line:                       # it never ended, and what is dying may still hold the pipe open
                self._take(self._line)
        except Exception:   # a bug: no place must be lost with it
            log.exception("The keeper of %s has failed", self.pid)
        finally:
            self._bury()
            self._part()

    def _close(self, pipe: IO[bytes]) -> None:
        self._epoll.unregister(pipe)     # closing does not do it while a process that is just being started has a copy
        pipe.close()

    def _attend(self, seconds: float) -> None:
        """Do what there is to do, or wait for it so long."""
        ready = self._epoll.poll(min(seconds, AT_EXIT_SECONDS if self._popen.stdout.closed else GLANCE_SECONDS))
        for descriptor, _ in ready:
            self._work[descriptor]()
        if not ready and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            self._end_at = 0             # it is not reaped: until all is over, its pid must not become another's

    def _write(self) -> None:
        """Write as much as the pipe takes."""
        try:
            while self._outgoing and (written := self._popen.stdin.write(self._outgoing[:65536])):
                self.wrote_at = time.monotonic()
                del self._outgoing[:written]
            if self._stdin_ends and not self._outgoing:
                self._close(self._popen.stdin)
        except OSError:          # it has exited, or does not listen any more
            self._close(self._popen.stdin)

    def _read(self) -> None:
        """Take what it says; without stdout it is of no use any more."""
        data = self._popen.stdout.read(65536)
        self._line += data
        if b"\n" in data:
            *lines, self._line = self._line.split(b"\n")
            for line in lines:
                self._take(line)
        if len(self._line) > LINE_AT_MOST:
            self.trouble = f"Kiro sent a line of more than {LINE_AT_MOST >> 20} MB"
        if not data or self.trouble:
            self._close(self._popen.stdout)
            self.end(patience=0.5)

    def _drain(self) -> None:
        data = self._popen.stderr.read(65536)
        self.stderr = (self.stderr + data.decode(errors="replace"))[-STDERR_KEPT:]
        log.debug("Process %s says: %.500r", self.pid, data)
        if not data:
            self._close(self._popen.stderr)

    def family(self) -> list[int]:
        """Return what runs of it and of all it has started; kiro-cli does not pass signals on [acp 4.2]."""
        return running(lambda pid: belongs(pid, self.mark, self.pid))

    def _bury(self) -> None:
        """Leave nothing: no process, no descriptor."""
        _kill(-self.pid, signal.SIGKILL)         # nobody is left whom the keeper could see to the end
        with self._popen:                        # closes the pipes, and reaps it
            pass
        self._work.clear()                       # a cycle, which would keep descriptors
        self.gone.set()


def end_processes(find: Callable[[], list[int]], seconds: float, wait: Callable[[float], None] = time.sleep) -> None:
    """TERM for all processes that `find` finds, and for those that do not end within so many seconds KILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        told: set[int] = set()
        limit = time.monotonic() + seconds
        while (found := set(find())) and time.monotonic() < limit:
            for pid in found - told:
                _kill(pid, number)
            told |= found
            wait(0.02)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:      # it is gone, or another user's
        pass


class Kiro(Process):
    """A Kiro process.  Its frames go to `post`, in order, as events of a conversation:
    ("response", kiro, frame), ("question", kiro, method, id, params), ("notification", kiro, method, params), ("exit", kiro).

    It has a place, which is given back when nothing of it is left.
    """

    def __init__(self, conversation: Conversation, workspace: str) -> None:
        """Start the process and list it.  Raises OSError and ValueError, and Closing."""
        self._conversation, self._post, self._bot = conversation, conversation.post, conversation.bot
        bot, settings = self._bot, self._bot.settings
        self.workspace = workspace
        self.heard_at = time.monotonic()
        self.agent: Optional[dict] = None        # its answer to initialize
        self.session_id = ""                     # once it is loaded
        self.models: Optional[Models] = None
        self.knows_tags = self.is_told = False   # the bot's tags: the session knows them, this prompt tells them
        self.kept_warm = False                   # counted among the warm ones
        self.exit_noticed = False                # by the conversation, which had handled all earlier frames then
        self.sign_ins: dict[tuple[str, str], bool] = {}      # (MCP server, address): was the user told
        self.in_flight: dict[str, tuple[int, float]] = {}     # by method: request id, when it was sent
        self.responses: dict[int, dict] = {}
        self.turn_open = False                   # between a prompt and its response
        self.replayed_before_response = False
        self.lock_pid: Optional[int] = None      # which of its processes its session's lock names
        self._next_id = self._prompt_id = 0
        mark = f"{os.getpid()}.{secrets.token_hex(6)}"
        with bot.spawning:
            if bot.closing.is_set():
                raise Closing
            super().__init__(mark, settings.kiro_command, cwd=workspace, umask=settings.umask,
                             env=child_environment(settings, mark, workspace))
            bot.processes.add(self)

    # -- to Kiro: nothing here waits, the keeper does ------------------------------------------------------------------

    def request(self, method: str, params: dict) -> tuple[int, float]:
        """Send a request; return its id and the time.  The response comes as an event."""
        self._next_id += 1
        self._send({"id": self._next_id, "method": method, "params": params})
        return self._next_id, time.monotonic()

    def prompt(self, blocks: list[dict]) -> tuple[int, float]:
        """Begin a turn; until its response, updates and permission requests are let through."""
        self._prompt_id, self.turn_open = self._next_id + 1, True
        return self.request("session/prompt", {"sessionId": self.session_id, "prompt": blocks})

    def result(self, request_id: int) -> dict:
        """Return the result that has come for a request.  Raises KiroRefusal."""
        frame = self.responses.pop(request_id)
        if "error" in frame:
            raise KiroRefusal(frame["error"], self.agent)
        return frame.get("result", {})

    def respond(self, request_id: Any, result: dict) -> None:
        """Answer a request of Kiro's."""
        self._send({"id": request_id, "result": result})

    def cancel(self) -> None:
        """Ask Kiro to end the turn, if there is one."""
        if self.turn_open:
            self._send({"method": "session/cancel", "params": {"sessionId": self.session_id}})

    def _send(self, frame: dict) -> None:
        self.send(json.dumps({"jsonrpc": "2.0", **frame}).encode() + b"\n")

    # -- from Kiro -----------------------------------------------------------------------------------------------------

    def can(self, what: str) -> bool:
        """Does the agent say that it can do this: "loadSession", or take "image" blocks?"""
        able = self.agent.get("agentCapabilities", {})
        return bool(able.get(what) or able.get("promptCapabilities", {}).get(what))

    def _take(self, line: bytes) -> None:
        """Pass one frame on: a response, a request, a notification, or junk [acp 2]."""
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):     # maybe its last words
            self.stderr += line[:STDERR_LINE_AT_MOST].decode(errors="replace") + "\n"
            return log.debug("Not JSON from Kiro %s: %.200r", self.pid, line)
        if not isinstance(frame, dict):
            return
        self.heard_at = time.monotonic()
        shape(frame, FRAME)
        method, params, number = frame.get("method"), frame.get("params", {}), frame.get("id")
        if method is None and type(number) is int and number <= self._next_id:
            self.turn_open &= number != self._prompt_id
            self._post("response", self, frame)
        elif method is not None and "id" in frame:
            self._take_request(number, method, params)
        elif method is not None and self._is_of_interest(method, params):
            self._post("notification", self, method, params)

    def _take_request(self, request_id: Any, method: str, params: dict) -> None:
        """Questions are asked in turns only; nothing else was agreed on."""
        if method not in QUESTIONS:
            self._send({"id": request_id, "error": {"code": -32601, "message": f"Method not found: {method}"}})
        elif self.turn_open:
            self._post("question", self, method, request_id, params)
        else:
            self.respond(request_id, QUESTIONS[method][1])

    def _is_of_interest(self, method: str, params: dict) -> bool:
        """What is said outside a turn is replay, and so is dropped here; extensions may come at any time."""
        mine, kind = params.get("sessionId") in (None, self.session_id), params.get("update", {}).get("sessionUpdate")
        if method.startswith("_kiro"):
            return mine or not self.session_id
        self.replayed_before_response |= not self.session_id and kind in HISTORY
        return mine and method == "session/update" and (self.turn_open or kind == "available_commands_update")

    def failure(self) -> KiroFailure:
        """Return the failure to raise when the process has gone.  Wrong usage and login are not worth a second try."""
        failure = KiroFailure(f"Kiro has exited ({self.how_it_ended()}).", said=self.stderr)
        failure.again = not (self._popen.returncode == 2 or is_login(failure) or self.trouble)
        return failure

    def _part(self) -> None:
        self._bot.places.give_back(self._conversation)
        if self.lock_pid is not None:
            remove_lock(self.session_id, self.lock_pid)
        self._post("exit", self)
        with self._bot.spawning:                 # it may not be listed yet
            self._bot.processes.discard(self)


def shape(value: dict, shapes: dict) -> None:
    """Take out of what an agent says whatever is not of the type that it should be; the rest of the code trusts these."""
    for key in shapes.keys() & value.keys():
        kind, found = shapes[key], value[key]
        if isinstance(kind, dict) and isinstance(found, dict):
            shape(found, kind)
        elif isinstance(kind, dict) or not isinstance(found, kind):
            del value[key]


def child_environment(settings: Settings, mark: str, workspace: str = "") -> dict[str, str]:
    """Return Kiro's environment: ours without the token, with the marks by which a later run knows its orphans, and
    without git finding the bot's own checkout above a topic's own folder."""
    secret = settings.token or "\0"
    env = {name: value for name, value in os.environ.items() if name != "BOT_TOKEN" and secret not in value}
    # The workspace's parent is another folder if WORKSPACE_BASE_PATH was changed since the thread began.
    parent = "" if is_allowed(workspace, settings) else os.path.dirname(workspace)
    ceilings = filter(None, [str(settings.workspaces), parent, env.get("GIT_CEILING_DIRECTORIES")])
    return {**env, "GIT_CEILING_DIRECTORIES": os.pathsep.join(ceilings), FOLDER_MARK: str(settings.folder),
            OWNER_MARK: owner_mark(), PROCESS_MARK: mark}


def command_lines(commands: Any) -> list[str]:
    """Return a line for each of an agent's commands: its name and what it does."""
    return [f"/{str(command.get('name')).lstrip('/')} – {one_line(str(command.get('description') or ''), COMMAND_WIDTH)}"
            for command in (commands if isinstance(commands, list) else ())[:COMMANDS_SHOWN] if isinstance(command, dict)]


def finite(value: Any) -> Optional[float]:
    """Return a number that can be reckoned with and shown, or None: JSON's may be of any size."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else None


def as_dict(value: Any) -> dict:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def error_text(error: Any) -> str:
    """Return what a JSON-RPC error says: Kiro in `data`, a string or an object, others in `message` [acp 3.4, 11]."""
    if not isinstance(error, dict):
        return str(error)
    data = error.get("data")
    texts = [error.get("message"), data, *map(as_dict(data).get, ("details", "message", "error"))]
    said = [text for text in texts if isinstance(text, str) and not SAYS_NOTHING.fullmatch(text)]
    return ": ".join(dict.fromkeys(said[:2])) or str(data or error.get("message") or "an error without a text")


def is_login(failure: KiroFailure) -> bool:
    """Is it that nobody is logged in?"""
    return failure.code == LOGIN_REQUIRED or bool(NOT_LOGGED_IN.search(failure.said))


def login_advice(failure: KiroFailure, settings: Settings) -> str:
    """Return how to log in, in the agent's own words where it is not Kiro."""
    ways = [str(way["description"]) for way in map(as_dict, failure.ways) if "description" in way]
    if is_kiro(settings) or not ways and "kiro" in (failure.agent or "kiro").lower():
        ways = ["kiro-cli login --use-device-flow (or set KIRO_API_KEY)."]
    elif not ways:
        ways = [f"log in to {one_line(failure.agent, COMMAND_WIDTH)}, as its documentation says."]
    return "\nOn the server, as the bot's user: " + "\nor: ".join(ways)


def models_of(result: dict) -> Optional[Models]:
    """Return the models of a session/new or session/load result, in either dialect [acp 8, 11], or None."""
    def read(choices: Any, name: str) -> list[tuple[str, str]]:
        return [(str(choice[name]), str(choice.get("name") or choice[name])) for choice in choices or ()]

    try:
        models = result.get("models") or {}
        if offered := read(models.get("availableModels"), "modelId"):
            return Models(offered, str(models.get("currentModelId") or ""), None)
        for option in result.get("configOptions") or ():
            if option.get("category") == "model" and option.get("options"):
                offered = read([c for o in option["options"] for c in o.get("options", [o])], "value")      # groups, or not
                return Models(offered, str(option.get("currentValue") or ""), option.get("id") or "")
    except (TypeError, KeyError, AttributeError) as error:
        log.warning("The agent's list of models can't be read: %r", error)
    return None


# -- locks and lost sessions -------------------------------------------------------------------------------------------

def kiro_home() -> Path:
    """Return where Kiro keeps what is its own."""
    return Path(os.environ.get("KIRO_HOME") or os.path.expanduser("~/.kiro"))


def session_file(session_id: str, extension: str) -> Optional[Path]:
    """Return where Kiro keeps one of a session's files [acp 4.1]; None for an id that could lead elsewhere."""
    return kiro_home() / "sessions" / "cli" / f"{session_id}.{extension}" if re.fullmatch(r"[\w-]+", session_id) else None


def size_of(session_id: str, extension: str) -> Optional[int]:
    """Return the size of one of a session's files: -1 when it is not there, None when that can't be seen from here."""
    path = session_file(session_id, extension)
    try:
        return path.stat().st_size if path else None
    except FileNotFoundError:
        return -1 if os.path.isdir(path.parent) else None
    except OSError:
        return None


def is_in_sight(session_id: str) -> bool:
    """Can Kiro's file of the session be seen from here?"""
    return (size_of(session_id, "json") or 0) > 0


def has_vanished(session_id: str, facts: SessionFacts) -> bool:
    """Is it plain to see that Kiro has no such session any more?  Not where its sessions were out of sight before."""
    return (facts.in_sight or not facts.ended) and size_of(session_id, "json") == -1


def is_empty(session_id: str) -> bool:
    """Is it plain to see that Kiro kept nothing of the session?  Such a one need not load [acp 3.3]."""
    return size_of(session_id, "jsonl") == 0


def session_is_lost(failure: KiroFailure, session_id: str, facts: SessionFacts, before: tuple[str, float]) -> bool:
    """Decide whether Kiro does not have the session any more; a passing trouble must not throw one away.

    Kiro has no clean error for it [acp 3.3]: when the answer does not say so, the session's files do, or the same refusal
    `before`, of another process some seconds ago.
    """
    if isinstance(failure, KiroLocked) or is_login(failure) or PASSING.search(failure.said):
        return False
    if is_empty(session_id) or has_vanished(session_id, facts):
        return True
    if not isinstance(failure, KiroRefusal) or facts.ended and is_in_sight(session_id):
        return False
    if not facts.ended or failure.code == RESOURCE_NOT_FOUND or LOST.search(failure.said):
        return True
    words, when = before
    return same_words(words) == same_words(failure.said) and time.monotonic() - when > REFUSED_AGAIN_SECONDS


def same_words(text: str) -> str:
    """Return the text without ids and numbers, which differ from one time to the next."""
    return re.sub(r"[0-9a-f-]{8,}|\d+", "", text)


def settle_lock(pid: int, session_id: str, settings: Settings, store: SessionStore) -> None:
    """Do what can be done about the process that holds a session's lock; return when loading may be tried again.

    A dying process of ours: nothing, its keeper ends it.  An orphan of ours: end it.  A dead process: remove its lock.
    Raises KiroLocked for a living stranger.
    """
    if is_ours(pid):
        return
    if is_orphan(pid, settings.folder):
        end_orphans(settings.folder)
    elif runs_as_kiro(pid, settings):
        raise KiroLocked(f"This topic's session is open in another program (process {pid}). Close it there, then ask again.")
    elif store.get_note(LOCKS_BY_PID):
        remove_lock(session_id, pid)


def owner_mark() -> str:
    """Return what tells this process from all others, also from later ones with its pid."""
    return f"{os.getpid()}.{_stat(os.getpid(), START_TIME)}"


def is_ours(pid: int) -> bool:
    """Has this process started it, or what it has started?"""
    return environment_of(pid).get(OWNER_MARK) == owner_mark()


def is_orphan(pid: int, folder: Path) -> bool:
    """Has a former run of this folder's bot left the process behind?"""
    env = environment_of(pid)
    owner, _, began = env.get(OWNER_MARK, "").partition(".")
    lives = is_running(owner) and _stat(owner, START_TIME) == began
    return env.get(FOLDER_MARK) == str(folder) and not lives and pid != os.getpid()     # Kiro may have started this bot


def end_orphans(folder: Path) -> None:
    """End all that former runs of this folder's bot have left behind."""
    orphans = functools.partial(running, lambda pid: is_orphan(pid, folder))
    if pids := orphans():
        log.warning("Ending what a former run has left behind: processes %s", pids)
        end_processes(orphans, TERM_SECONDS)


def runs_as_kiro(pid: int, settings: Settings) -> bool:
    """Does the process run, and as Kiro?  The pid in a lock may have been given to another program since [acp 4.1]."""
    command_line = os.fsdecode(_proc(pid, "cmdline")).lower()
    names = [os.path.basename(word).lower() for word in ["kiro", *settings.kiro_command]]
    return any(name in command_line for name in names if not NO_SIGN.fullmatch(name))


def remove_lock(session_id: str, pid: int) -> None:
    """Remove the session's lock if it names this process, which is dead or no Kiro, or for some time nobody."""
    path, holder = session_file(session_id, "lock"), lock_pid(session_id)
    try:
        if path and (holder == pid or holder is None and time.time() - path.stat().st_mtime > 2):
            path.unlink()
            log.info("Removed the lock that process %s left on session %s", holder, session_id)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.error("A dead lock can't be removed: %s", error)


def lock_pid(session_id: str) -> Optional[int]:
    """Return the process that the session's lock names; None when there is no lock that could be understood."""
    path = session_file(session_id, "lock")
    try:
        return int(json.loads(path.read_text())["pid"]) if path else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


# -- processes, by /proc -----------------------------------------------------------------------------------------------

STATE, START_TIME = 0, 19     # fields of /proc/PID/stat


def _proc(pid: int | str, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _stat(pid: int | str, field: int) -> str:
    """Return one of the fields of /proc/PID/stat after the name; nothing when there is no process."""
    return "".join(os.fsdecode(_proc(pid, "stat")).rpartition(")")[2].split()[field:field + 1])


def is_running(pid: int | str) -> bool:
    """Does the process exist, and not as a zombie?"""
    return _stat(pid, STATE) not in ("", "Z", "X")


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that the process was started with; empty when it is not ours to see."""
    return dict(pair.partition("=")[::2] for pair in os.fsdecode(_proc(pid, "environ")).split("\0"))


def belongs(pid: int, mark: str, group: int) -> bool:
    """Does the process carry the process mark in its environment, or is it of the process group?"""
    try:                         # looked at for every process of the machine, several times a turn
        return os.getpgid(pid) == group or f"{PROCESS_MARK}={mark}\0".encode() in _proc(pid, "environ")
    except ProcessLookupError:
        return False


def running(is_wanted: Callable[[int], bool]) -> list[int]:
    """Return the running processes that are wanted."""
    pids = [int(path.rpartition("/")[2]) for path in glob.glob("/proc/[0-9]*")]
    return [pid for pid in pids if is_wanted(pid) and is_running(pid)]


# ======================================================================================================================
# Answer: what Kiro says, as it comes and as it stays
# ======================================================================================================================

ANSWER_SECONDS = 30             # how long to insist on a part of an answer, which is five tries; it is held after that
ONCE = 0.01
TRIES = 5
HOLD_SECONDS = 30               # until what is held is tried again, at first
DOUBLED_AT_MOST = 5
COMPACTION = {"started": "Compacting the conversation…", "completed": "The conversation was compacted.",
              "failed": "⚠️ The conversation could not be compacted: {}"}


class Answer:
    """What Kiro has said and done in a turn: frames in, text out.  It knows no clock and no thread."""

    def __init__(self) -> None:
        self.length = 0                        # characters
        self.heard = False                     # text, a tool call or a permission request came
        self.grace: Optional[float] = None     # seconds within which the response is to come now
        self.running = ""                      # the title of the tool that was heard of last, while it runs
        self.steps = 0                         # tool calls begun
        self.plan: list[tuple[str, str]] = []  # its entries: what, and pending, in_progress or completed
        self.trouble = ""                      # Kiro's last word about limits, retries and compaction
        self.credits: Optional[float] = None   # what it cost, if Kiro told
        self._pieces: list[str] = []
        self._files: list[dict] = []           # what it sent beside the text, as parts
        self._attempt = 0                      # how many pieces were there when Kiro's present attempt began
        self._gap = False                      # a tool or the like lies between the last piece and the next
        self._message_id: Any = None           # of the last piece, where the agent tells
        self._cut = False                      # it said more than anybody can read
        self._tools: dict[str, dict] = {}      # calls that have not ended, by id
        self._last_tool = ""                   # the last one that did, and how
        self._changes: dict[str, str] = {}     # by file: what Kiro's tools did to it, as lines with - and +

    def hear(self, method: str, params: dict) -> None:
        """Take in a notification; what says nothing about the answer is left aside [acp 3.5, 3.8]."""
        name, update = method.partition("/")[2], as_dict(params.get("update"))
        if method == "session/update":
            self._hear_update(update)
        elif name == "session/update":
            self._hear_trouble(update)
        elif name == "metadata" and (usage := as_list(params.get("meteringUsage"))):
            self.credits = sum(finite(as_dict(entry).get("value")) or 0 for entry in usage)
        elif name == "error/rate_limit":
            self.trouble = str(params.get("message") or "Kiro is being rate-limited")
        elif name == "compaction/status":
            status = params.get("status")          # of /compact, or by itself; a turn may say nothing else
            told = COMPACTION.get(str(as_dict(status).get("type", status)), "")
            self.trouble = told.format(as_dict(status).get("error") or "Kiro does not say why")

    def _hear_update(self, update: dict) -> None:
        kind = update.get("sessionUpdate")
        if kind == "agent_message_chunk":
            before, self._message_id = self._message_id, update.get("messageId")
            self._gap |= bool(before and self._message_id and before != self._message_id)
            self._hear_block(as_dict(update.get("content")))
        elif kind in ("tool_call", "tool_call_update"):
            self._hear_tool(update)
        elif kind == "plan":
            self._gap, entries = True, map(as_dict, as_list(update.get("entries")))
            self.plan = [(one_line(str(entry.get("content")), PLAN_WIDTH), str(entry.get("status"))) for entry in entries]
        elif kind == "turn_end":
            self.grace = AFTERWORD_SECONDS

    def _hear_block(self, block: dict) -> None:
        """Take in a piece of the answer: text, a link, or what is sent as a file."""
        inner = as_dict(block.get("resource")) or block
        text, data, uri = (str(inner.get(key) or "") for key in ("text", "data", "uri"))
        path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else ""
        if text:
            self.say(text)
        elif data or path:
            path = path or f"image{mimetypes.guess_extension(str(inner.get('mimeType'))) or ''}"
            if self._fits(len(data)):
                self._files.append({"kind": "file", "path": path, "caption": "", "data": data})
        elif uri:
            self._gap = True
            self.say(f"[{block.get('name') or uri}]({uri})\n\n")

    def _fits(self, size: int) -> bool:
        """Count a piece; say whether it is still wanted."""
        self.heard, self._cut = True, self.length > ANSWER_AT_MOST
        self.length += 0 if self._cut else size
        return not self._cut

    def say(self, text: str) -> None:
        """Add a piece of the answer, set apart when a tool lies between."""
        if not self._fits(len(text)):
            return
        if self._gap and self._pieces:
            self._pieces[-1] = self._pieces[-1].rstrip("\n") + "\n\n"
        self._pieces.append(text)
        self._gap, self.running, self.trouble = False, "", ""
        self.grace = INTERRUPTED_SECONDS if text.strip() == INTERRUPTED else None

    def _hear_tool(self, update: dict) -> None:
        """A tool call begins, tells something, or ends; v2 gives no status at its beginning."""
        tool_id = str(update.get("toolCallId"))
        self.steps += update.get("sessionUpdate") == "tool_call"
        call = self._tools.pop(tool_id, {})
        call.update({key: value for key, value in update.items() if value is not None})
        title, status = str(call.get("title") or call.get("kind") or "a tool"), update.get("status")
        if status in ("completed", "failed"):
            self.running = "" if title == self.running else self.running
            self._last_tool = "\n".join([f"{title}: {status}", *content_texts(call.get("content"))])
            if status == "completed" and call.get("kind") in ("edit", "delete", "move"):
                self._note_changes(call)
        else:
            self._tools[tool_id] = call
            self.running = title
            if len(self._tools) > TOOLS_KEPT:
                del self._tools[next(iter(self._tools))]
        self.heard = self._gap = True
        self.grace = None
        self._attempt = len(self._pieces)

    def _note_changes(self, call: dict) -> None:
        """Note what a tool call did to files: the lines of its diffs, or at least their names."""
        diffs = [block for block in as_list(call.get("content")) if as_dict(block).get("type") == "diff"]
        for block in diffs or as_list(call.get("locations")) or [call.get("rawInput")]:
            path, *changed = content_texts([{**as_dict(block), "type": "diff"}])
            is_much = sum(map(len, self._changes.values())) > CHANGES_AT_MOST
            self._changes[path] = "\n".join([self._changes.get(path, ""), *changed[:0 if is_much else None]])

    def changes(self) -> str:
        """Return the files that were changed by Kiro's own tools, each with what went and what came."""
        texts = [f"{path}  +{text.count(NEW)} -{text.count(OLD)}{text}" for path, text in self._changes.items()]
        return counted("\n\n".join(texts), CHANGES_AT_MOST)

    def closing(self, seconds: float) -> str:
        """Return the line that says what the turn took and did; nothing for a short one that changed no file."""
        if seconds < LONG_SECONDS and not self._changes:
            return ""
        counts = ((self.steps, "step"), (len(self._changes), "file"))
        told = [duration(seconds), *(f"{n} {what}{'s' * (n > 1)}" for n, what in counts if n)]
        return " · ".join(told + ([f"{self.credits:.4g} credits"] if self.credits is not None else []))

    def _hear_trouble(self, update: dict) -> None:
        """Kiro starts its present attempt anew, or says why it has to wait."""
        kind = update.get("sessionUpdate")
        if kind == "stream_discarded":
            del self._pieces[self._attempt:]
            self.length, self._gap = sum(map(len, self._pieces)), bool(self._pieces)
        elif kind in ("retry_warning", "stream_stall_notice"):
            self.trouble = str(update.get("message") or "Kiro tries again")

    def progress(self) -> list[str]:
        """Return how far it is: the step from the second on, and of a plan how much is done and what comes now."""
        done = sum(status == "completed" for _, status in self.plan)
        now = next((what for what, status in self.plan if status != "completed"), "")
        return [f"step {self.steps}"] * (self.steps > 1) + [f"{done}/{len(self.plan)} {now}".strip()] * bool(self.plan)

    def text(self) -> str:
        """Return what Kiro has said so far."""
        return whole_characters("".join(self._pieces)).replace("\r\n", "\n").strip("\n")

    def describe(self, tool_call: dict) -> str:
        """Return the question about a tool call: what it is, and each of its arguments, in plain sight."""
        begun = self._tools.get(str(tool_call.get("toolCallId")), {})
        call = begun | {key: value for key, value in tool_call.items() if value is not None}
        title, kind, raw = str(call.get("title") or "use a tool"), str(call.get("kind") or "other"), call.get("rawInput")
        named = "" if kind in ("other", "execute") or kind in title.lower() else f" ({kind})"
        lines = [in_plain_sight(f"❓ Kiro wants to: {title}{named}")]
        for name, value in as_dict(raw).items() or [("", raw)] * bool(raw):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if shown not in (title, title.partition(": ")[2]):
                lines.append(counted(f"{name}: {shown}" if name else shown))
        contents = [*content_texts(tool_call.get("content")), *content_texts(begun.get("content"))]
        lines += map(counted, dict.fromkeys(contents))
        for path in (str(as_dict(place).get("path") or "") for place in as_list(call.get("locations"))):
            if not any(path in line for line in lines):
                lines.append(counted(path))
        return counted("\n".join(lines), QUESTION_LIMIT)

    def parts(self, outcome: Outcome, notes: str, remarks: list[str], seconds: float = 0) -> list[dict]:
        """Return the whole answer for the journal: notes, what Kiro said, remarks."""
        text, closing, said, remarks = self.text(), self.closing(seconds), [], [outcome.remark, *remarks]
        if text.strip():
            end = [remarks.pop(0) if outcome.stopped else "", closing]
            said, closing = [{"kind": "answer", "text": text, "end": "\n\n".join(filter(None, end))}], ""
        if self._cut:
            remarks.append(f"⚠️ The answer went on after {ANSWER_AT_MOST >> 20} million characters; the rest is left out.")
        if not (said or self._files or any(remarks)):
            remarks.append(self.trouble or self._last_tool or NOTHING_SAID)
        notes, remark = (counted(text, QUESTION_LIMIT) for text in (notes, "\n\n".join(filter(None, [*remarks, closing]))))
        return plain_parts(notes) + said + self._files + plain_parts(remark)


def content_texts(content: Any) -> Iterator[str]:
    """Yield what a tool call's content shows: texts, and of changed files what lies between the same beginning and end."""
    for block in map(as_dict, as_list(content)):
        text = as_dict(block.get("content")).get("text")
        if isinstance(text, str):
            yield text
        elif block.get("type") == "diff":
            old, new = (str(block.get(key) or "").splitlines() for key in ("oldText", "newText"))
            before = len(os.path.commonprefix([old, new]))
            after = len(os.path.commonprefix([old[before:][::-1], new[before:][::-1]]))
            yield str(block.get("path"))
            for sign, lines in (("-", old), ("+", new)):
                if changed := lines[before:len(lines) - after]:
                    yield "\n".join(f"{sign} {line}" for line in changed)


def counted(text: str, limit: int = ARGUMENT_LIMIT) -> str:
    """Return the text in plain sight, or its beginning and how much more there is."""
    more = f"\n⚠️ {len(text) - limit} more characters are not shown." * (len(text) > limit)
    return in_plain_sight(text[:limit]) + more


def plan_lines(plan: list[tuple[str, str]]) -> list[str]:
    """Return a plan's entries with their signs, as far as one wants to read them."""
    lines = [f"{PLAN_SIGNS.get(status, '☐')} {what}" for what, status in plan[:PLAN_LENGTH]]
    return lines + [f"… {len(plan) - PLAN_LENGTH} more"] * (len(plan) > PLAN_LENGTH)


class Draft:
    """A turn's streamed preview.  Used on the conversation's thread; `stopped` is set under its lock."""

    def __init__(self, chat: Topic) -> None:
        self._chat = chat
        self.id = random.randint(1, 2**31 - 1)
        self.stopped = False                   # by its button: Telegram wants no more frames of it [tg 1.3]
        self._shown: Optional[tuple[int, str]] = None       # the answer's length and the status in its last frame
        self._sent_at: Optional[float] = None

    def hide(self) -> None:
        """A message in the topic has taken its place [tg 1.5]."""
        self._shown = None

    def refresh(self, answer: Answer, doing: str, clock: str) -> float:
        """Send a frame if there is news, or the last one is about to expire; return when to look again.

        `clock` is shown with what is being done, and is no news.
        """
        now, news = time.monotonic(), (answer.length, doing)
        if self.stopped:
            return math.inf
        if news == self._shown and now < self._sent_at + KEEP_ALIVE_SECONDS:
            return self._sent_at + KEEP_ALIVE_SECONDS
        wait = self._chat.frame_wait(self._sent_at, now)
        if wait:
            return now + wait
        self._sent_at = now
        said, _ = visible_text(answer.text(), still_coming=True)
        self._shown = news if self._chat.frame(self.id, said, (doing + clock).removeprefix(" · ")) else None
        return time.monotonic()


class Outgoing(NamedTuple):
    """What is left of an answer."""
    turn_id: Optional[int]
    parts: deque[tuple[int, dict]]             # with their positions
    offer: bool
    former: bool = False                       # a former run began to send it


class Delivery:
    """Brings a topic's answers to Telegram, part by part, also those of a former run.  On the conversation's thread.

    What Telegram does not take stays in the journal and is tried again, behind whatever else the topic has to do.

    A part is one lasting message, as JSON-able dict: {"kind": "plain" | "rich" | "source", "text"}, where source is Markdown
    to be shown as plain text, {"kind": "whole", "text", "caption"}, which goes as a file, or {"kind": "file", "path",
    "caption", "data"?}, whose bytes are at the path, or in it as base64; {"kind": "answer", "text", "end"?} is what Kiro said,
    not yet cut and made safe.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._store, self._chat = conversation, conversation.store, conversation.chat
        self._attempt = conversation.bot.attempt       # that what is left can't be journaled is no reason not to send it
        self.held: list[Outgoing] = []         # what Telegram did not take, oldest first
        self.tries = 0                         # how often the first of it was tried
        self.try_at = math.inf                 # when to try it again
        self.sending = False                   # a part is on its way, and not ticked off yet; read by the main thread
        self.unsent: list[str] = []            # files that could not be sent, for Kiro to hear of

    def send(self, outgoing: Outgoing, once: bool = False) -> None:
        """Send what is left, in order, and tick it off; hold it if Telegram does not take the next part, or not at `once`."""
        left, self.sending = outgoing.parts, True
        try:
            while left:
                pieces = self._send_first(outgoing, once)
                (position, _), once = left.popleft(), False
                if pieces:
                    rest = [*pieces, *(part for _, part in left)]
                    left.clear()
                    left.extend(enumerate(rest))
                    self._attempt(self._store.answer, outgoing.turn_id, [json.dumps(part) for part in rest], outgoing.offer)
                else:
                    self._attempt(self._store.tick, outgoing.turn_id, position)
        except TelegramError as error:
            return self._hold(outgoing, error)
        finally:
            self.sending = False
        self._finish(outgoing)

    def _finish(self, outgoing: Outgoing) -> None:
        """All of it is sent.  What is held is tried again now: it may go through as well."""
        if outgoing in self.held:
            self.held.remove(outgoing)
        self.try_at = time.monotonic() if self.held else math.inf
        self._conversation.bot.note(self._store.finish, outgoing.turn_id, outgoing.offer)

    # -- what Telegram does not take -----------------------------------------------------------------------------------

    def _hold(self, outgoing: Outgoing, error: TelegramError) -> None:
        """Keep it, to be tried again behind whatever comes next in the topic."""
        log.error("An answer to %s/%s is held: %s", *self._conversation.key, error)
        self.tries = self.tries + 1 if self.held else TRIES
        if outgoing not in self.held:
            self.held.append(outgoing)
            if isinstance(error, Refused):
                self._tell(f"⚠️ Telegram does not take a part of the answer: {error.description}. I'll keep trying; "
                           "/stop gives it up.")
        pause = HOLD_SECONDS * 2 ** min(self.tries - TRIES, DOUBLED_AT_MOST)
        self.try_at = time.monotonic() + max(pause, getattr(error, "seconds", 0))

    def is_due(self) -> bool:
        """Is it time to try again what is held?"""
        return time.monotonic() >= self.try_at

    def try_again(self) -> None:
        """Try once to send what is held, each answer in its turn."""
        self.try_at = math.inf
        for outgoing in list(self.held):
            self.send(outgoing, once=True)

    def give_up(self) -> None:
        """Drop the part that Telegram does not take, and go on with what comes after it."""
        if not self.held:
            return
        outgoing = self.held[0]
        position, _ = outgoing.parts.popleft()
        self._attempt(self._store.tick, outgoing.turn_id, position)
        self.try_at = time.monotonic()
        self._tell("⏹ I have given up the part of the answer that Telegram does not take. Kiro knows it; you can ask for it.")

    def _tell(self, text: str) -> None:
        self._conversation.bot.tell(self._conversation.key, text, silent=True)

    # -- a part --------------------------------------------------------------------------------------------------------

    def _pieces(self, answer: dict, former: bool) -> list[dict]:
        """Return the messages and files that an answer becomes.

        That it still stands in the journal as Kiro gave it means that a former run could not format it: it goes as it is.
        """
        text, end = answer["text"], answer.get("end", "")
        try:
            if not former:
                folder = self._conversation.agent.workspace
                shown, files = visible_text(text, exists=lambda path: os.path.lexists(os.path.join(folder(), path)))
                shown = "\n\n".join(filter(None, [shown, end]))
                pieces = self._chat.parts(shown) if shown.strip() else []
                pieces += [{"kind": "file", "path": path, "caption": caption} for path, caption in files]
                return pieces or plain_parts(NOTHING_SAID)
        except Exception:   # a bug there must not cost an answer
            log.exception("An answer can't be formatted and is sent as it is")
        return [plain_part(piece) for piece in util.smart_split(text, PLAIN_LIMIT // 2) if piece.strip()]

    def _send_first(self, outgoing: Outgoing, once: bool) -> list[dict]:
        """Send the first part; return what Telegram is to get instead, if it did not take it as it is.

        Only the last part of all makes the phone ring.
        """
        part, *others = (part for _, part in outgoing.parts)
        if part["kind"] == "answer":
            return self._pieces(part, outgoing.former)
        if part["kind"] == "file":
            return self._send_file(part, silent=bool(others))
        is_last = all(other["kind"] == "file" for other in others)
        return self._chat.send(part, self._buttons(outgoing) if is_last else [],
                               seconds=ONCE if once else ANSWER_SECONDS, disable_notification=bool(others))

    def _buttons(self, outgoing: Outgoing) -> Buttons:
        """Return the buttons of an answer's last message; none for a turn that could not be journaled."""
        turn_id, conversation = outgoing.turn_id, self._conversation
        if turn_id is None:
            return []
        rows = [[("Ask again", f"again:{turn_id}"), ("Drop", f"drop:{turn_id}")]] * outgoing.offer
        return rows + [[("Changes", f"changes:{conversation.key[1]}:{turn_id}")]] * bool(conversation.changes.get(turn_id))

    def _send_file(self, part: dict, silent: bool) -> list[dict]:
        """Send a file; return what goes in its place: a message if that can't be, two if the caption is too long for one."""
        if utf16_length(part["caption"]) > CAPTION_LIMIT:
            return [{**part, "caption": ""}, *plain_parts(part["caption"])]
        refusal = self.upload(part, silent)
        if not refusal:
            return []
        self.unsent.append(f"{part['path']}: {refusal}")
        return plain_parts(f"⚠️ Kiro wanted to send {part['path']}, but {refusal}.")

    def upload(self, part: dict, silent: bool) -> str:
        """Send a file of the topic's folder, or one that came in the answer itself; return why not, or nothing.  May be called
        from any thread."""
        path, data = part["path"], part.get("data")
        try:
            file = io.BytesIO(base64.b64decode(data)) if data else open_inside(path, self._conversation.agent.workspace())
            with file:
                return self._chat.upload(file, path, part["caption"], silent)
        except FileRefused as error:
            return str(error)
        except (OSError, ValueError, StoreError, KiroFailure) as error:
            return f"it can't be read: {getattr(error, 'strerror', None) or error}"

    def card(self, unfinished: UnfinishedTurn) -> list[dict]:
        """Return what Kiro had said, and the message that offers the turn again."""
        asked: list[str] = []
        for row in self._store.messages_of(unfinished.turn_id):        # telebot's parsers raise anything
            self._attempt(lambda row: asked.append(words(Incoming.from_journal(row).message) or "(a file)"), row)
        said = [{"kind": "answer", "text": unfinished.partial}] if unfinished.partial else []
        return said + [plain_part(f"⚠️ I was interrupted while working on: {shortened(' / '.join(asked), EXCERPT_LENGTH)}")]


# ======================================================================================================================
# Reply: the one door to Telegram, a chat's pace, drafts and lasting messages
# ======================================================================================================================

FRAME_SECONDS = 1.5             # between two frames of a chat, over all its topics [tg 1.4]
TIMEOUTS = {"sendMessageDraft": (3, 4), "getUpdates": None}   # seconds to connect, to read; None: telebot's
TIMEOUT = (10, 30)
UPLOAD_TIMEOUT = (10, 300)
KEEP_ALIVE = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
              (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30), (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
              (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)]    # a connection that a NAT has dropped is noticed before it is used
IDLE_CONNECTIONS = 4
RETRY_DELAYS = (1, 2, 4, 8, 15, 30)
GET_FILE_SECONDS = 60
UPLOAD_CHUNK = 64 * 1024
TYPING_SECONDS = 4              # between signs of life where there are no drafts; one lasts for five
SAY_SECONDS = 10 * 60           # how long to insist on a message of the bot's own
TOO_LARGE = (413, 414)          # what a proxy says of a request; the same again would be refused too
FLOOD_SECONDS = 5               # for a 429 that doesn't say how long
FLOOD_AT_MOST = 24 * 3600
PLAIN_LIMIT = 4096              # UTF-16 units [tg 2.4]
RICH_LIMIT = 30_000             # of 32768 UTF-16 units [tg 2.1], of source; what makes it safe adds a little
RICH_SHORT = 6000               # characters where a blank line allows it: clients were seen to cut longer ones
RICH_BLOCKS = 480               # of 500, with room for a list or a table that goes on [tg 2.1]
PARTS_AT_MOST = 20              # of an answer; of a longer one some are shown at both ends, and all of it goes as a file
PARTS_SHOWN = 3
ANSWER_FILE = "answer.md"
TOO_MUCH = re.compile("too long|TEXT_TOO_LONG|BLOCKS_TOO_MANY")    # a smaller part may be taken [tg 2.2]
OTHER_FORM = re.compile(f"{TOO_MUCH.pattern}|(?i:style)")     # nor is the topic to blame where a server knows no colours
HALVED_AT_LEAST = 1000          # a part that is refused although it is smaller goes plain
DRAFT_LIMIT = 4000
CAPTION_LIMIT = 1024
TITLE_LIMIT = 40                # characters
PHOTO_BYTES = 10 * 1024 * 1024
UPLOAD_BYTES = 50 * 1024 * 1024
LOCAL_UPLOAD_BYTES = 2000 * 1024 * 1024
NO_PREVIEW = types.LinkPreviewOptions(is_disabled=True)
NO_DRAFTS = re.compile(r"^404|^400.*method|TEXTDRAFT")         # a server that does not know them
ABOUT_TOPIC = re.compile(r"thread|TOPIC_", re.IGNORECASE)      # in a refusal; there are more ways to say it
TOPIC_GONE = "The topic is gone or closed ({}), so I answer here:"

Buttons = list[list[tuple[str, Any]]]   # rows of (label, data), or (label, what telebot's button gets instead of data)


class Link(str):
    """An address that a button opens."""


class TelegramError(Exception):
    """Something was not done."""


class Refused(TelegramError):
    """Telegram's definite no."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{code} {description}")
        self.code, self.description = code, description


class Unauthorized(Refused):
    """The token is not (any longer) valid."""


class Conflict(Refused):
    """Somebody else gets this bot's updates."""


class Unreachable(TelegramError):
    """No definite answer: no connection, a timeout, a server's fault.  What was sent may have arrived."""


class Fault(Unreachable):
    """A server's fault, and the server says so, with a 5xx or in words."""


class TooManyRequests(TelegramError):
    """Telegram wants silence in this chat for some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"flood control: {seconds:g} s")
        self.seconds = seconds


class Pace:
    """The gate of one chat: a frame every FRAME_SECONDS over all topics, nothing while Telegram wants silence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed_until = self._next_frame = 0.0

    def close(self, seconds: float) -> None:
        """Telegram has answered 429."""
        with self._lock:
            self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    def closed_for(self) -> float:
        """Return for how many seconds nothing may be sent."""
        return max(0.0, self._closed_until - time.monotonic())

    def frame_wait(self, last: Optional[float], now: float) -> float:
        """Return 0 when a frame may be sent now, else the seconds until it is worth asking again.

        `last` is when its turn sent one; the first frame of a turn (None) waits for nobody.
        """
        with self._lock:
            free_at = self._closed_until if last is None else max(self._closed_until, self._next_frame)
            if now < free_at:
                return free_at - now
            self._next_frame = max(self._next_frame, now + FRAME_SECONDS)
            return 0


class Telegram:
    """The one door to Telegram.  It alone knows the token, telebot's errors and flood control.

    Parameters travel in the request's body, since telebot would put them, and so whole messages, into the URL [tg 5.6];
    nothing is repeated behind our back.
    """

    def __init__(self, settings: Settings, closing: threading.Event) -> None:
        self._token, self._closing = settings.token, closing
        self._api_url = settings.api_url
        self.is_local = settings.api_url != TELEGRAM_API
        self.rich = self.drafts = True         # until the server turns out not to know rich messages, or drafts
        self._paces: dict[int, Pace] = {}
        self._session = requests.Session()     # one for all threads: a new thread finds connections that are open
        self._session.proxies = requests.utils.get_environ_proxies(settings.api_url)
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._session.trust_env = False        # looked up once, not for each request
        for prefix in ("http://", "https://"):
            self._session.mount(prefix, requests.adapters.HTTPAdapter(pool_maxsize=IDLE_CONNECTIONS))
        urllib3.connection.HTTPConnection.default_socket_options = KEEP_ALIVE
        apihelper.API_URL = settings.api_url + "/bot{0}/{1}"
        apihelper.FILE_URL = settings.api_url + "/file/bot{0}/{1}"
        apihelper.CUSTOM_REQUEST_SENDER = self._post
        apihelper.RETRY_ON_ERROR = False       # it would send messages several times [tg 5.6]

    def pace(self, chat: Optional[int]) -> Pace:
        """Return the chat's gate."""
        return self._paces.setdefault(chat, Pace())

    def call(self, method: Callable[..., Any], *args: Any, chat: Optional[int] = None, **kwargs: Any) -> Any:
        """Call one of telebot's apihelper functions once; return Telegram's result as it came.

        `chat` is the chat whose gate a 429 closes.  Raises Refused, Unauthorized, Conflict, TooManyRequests, Unreachable.
        """
        try:
            return method(self._token, *args, **kwargs)
        except apihelper.ApiTelegramException as error:
            raise self._failure(error, chat) from None
        except apihelper.ApiHTTPException as error:
            status = error.result.status_code
            if status in TOO_LARGE and method is not apihelper.send_message:       # a text is never that large
                raise Refused(status, "too large for a proxy on the way") from None
            raise (Fault if status >= 500 else Unreachable)(f"HTTP {status} without an answer of the Bot API") from None
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL):
            proxy = requests.utils.select_proxy(self._api_url, self._session.proxies)
            name = next((name for name, value in os.environ.items() if value == proxy), "TELEGRAM_API_URL")
            raise SettingsError(f"{name} can't be used: it is a bad address, or one for SOCKS without PySocks") from None
        except (apihelper.ApiException, requests.RequestException, urllib3.exceptions.HTTPError,
                KeyError, TypeError, ValueError) as error:      # no answer, or in no known form; the texts hold the token
            raise Unreachable(type(error).__name__) from None

    def _failure(self, error: apihelper.ApiTelegramException, chat: Optional[int]) -> Exception:
        code, description = error.error_code, error.description
        if code == 429:
            seconds = finite(as_dict(error.result_json.get("parameters")).get("retry_after"))      # need not be said [tg 6]
            seconds = FLOOD_SECONDS if seconds is None else min(max(seconds, 1), FLOOD_AT_MOST)
            self.pace(chat).close(seconds)
            return TooManyRequests(seconds)
        if code >= 500 or "temporarily" in description:        # what getFile says of some files for a while [tg 7]
            return Fault(f"{code} {description}")
        return {401: Unauthorized, 409: Conflict}.get(code, Refused)(code, description)

    def insist(self, method: Callable[..., Any], *args: Any, chat: int, seconds: float = SAY_SECONDS, **kwargs: Any) -> Any:
        """Call until there is a definite answer, for so many seconds; what was lost on the way is sent again.

        Raises Refused, also when the server fails at nothing but this; TooManyRequests, Unreachable, and Closing when the
        bot is stopping.
        """
        limit, failures = time.monotonic() + seconds, 0
        while True:
            closed = self.pace(chat).closed_for()
            if closed and time.monotonic() + closed > limit:
                raise TooManyRequests(closed)
            self.pause(closed)
            try:
                return self.call(method, *args, chat=chat, **kwargs)
            except TooManyRequests:
                pass                           # the gate is closed now
            except (Unreachable, Unauthorized) as error:
                delay = retry_delay(failures)
                log.log(logging.DEBUG if failures else logging.WARNING, "%s: %s; trying again", method.__name__, error)
                failures += 1
                if time.monotonic() + delay > limit:
                    if seconds and isinstance(error, Fault) and self._works():
                        raise Refused(500, str(error)) from error
                    raise Unreachable(str(error)) from error
                self.pause(delay)

    def _works(self) -> bool:
        """Do other calls go through?"""
        try:
            return bool(self.call(apihelper.get_me))
        except TelegramError:
            return False

    def pause(self, seconds: float) -> None:
        """Wait.  Raises Closing when the bot is stopping."""
        if self._closing.wait(seconds):
            raise Closing

    def _post(self, method: str, url: str, params: Optional[dict] = None, files: Optional[dict] = None,
              timeout: Any = None, proxies: Any = None) -> requests.Response:
        """Send what telebot has prepared.  Its name is telebot's CUSTOM_REQUEST_SENDER."""
        timeout = UPLOAD_TIMEOUT if files else TIMEOUTS.get(url.rpartition("/")[2], TIMEOUT) or timeout
        form = Form(params, *files.popitem()) if files else None
        response = self._session.post(url, data=form or params, headers=form and form.headers, timeout=timeout)
        response.encoding = "utf-8"            # else requests guesses it, at length
        return response

    def download(self, file_id: str, chat: int) -> Iterator[bytes]:
        """Yield a file's bytes.  Raises as `insist`, and OSError."""
        path = self.insist(apihelper.get_file, file_id, chat=chat, seconds=GET_FILE_SECONDS)["file_path"]
        if self.is_local and os.path.isabs(path):       # a local Bot API server hands out its own files [tg 4]
            with open(path, "rb") as file:
                return (yield from iter(lambda: file.read(DOWNLOAD_CHUNK), b""))
        try:
            url = apihelper.FILE_URL.format(self._token, requests.utils.quote(path))
            with self._session.get(url, stream=True, timeout=TIMEOUT) as response:
                if response.status_code != 200:
                    raise Unreachable(f"HTTP {response.status_code} for a file")
                yield from response.iter_content(DOWNLOAD_CHUNK)
        except requests.RequestException as error:      # its text holds the token
            raise Unreachable(type(error).__name__) from None


def plain_part(text: str) -> dict:
    """Return a part that is text as it is."""
    return {"kind": "plain", "text": whole_characters(text)}


def plain_parts(text: str, kind: str = "plain") -> list[dict]:
    """Return the text as parts of this kind and of allowed size; none for an empty one."""
    return [{**plain_part(piece), "kind": kind} for piece in split_text(text, PLAIN_LIMIT)]


def markup(buttons: Optional[Buttons]) -> Optional[types.InlineKeyboardMarkup]:
    """Return an inline keyboard, or None for no buttons."""
    if not buttons:
        return None
    rows = [[types.InlineKeyboardButton(whole_characters(label).strip()[:64] or "?",
                                        **(data if isinstance(data, dict) else {"callback_data": data}))
             for label, data in row] for row in buttons]
    return types.InlineKeyboardMarkup(rows)


def retry_delay(failures: int) -> float:
    """Return for how many seconds to wait after another failure, when so many came before it in a row."""
    return RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)]


class Topic:
    """A topic of a private chat: what a conversation can do there."""

    def __init__(self, telegram: Telegram, user_id: int, thread_id: int, rich: bool) -> None:
        self._telegram, self._user_id, self._thread_id, self._rich = telegram, user_id, thread_id, rich
        self._pace = telegram.pace(user_id)
        self._gone = False                     # the topic takes nothing, and that was said

    # -- drafts --------------------------------------------------------------------------------------------------------

    def frame_wait(self, last: Optional[float], now: float) -> float:
        """Return 0 when a frame may be sent now, else the seconds until it is worth asking again."""
        if not self._telegram.drafts and last is not None and now < last + TYPING_SECONDS:
            return last + TYPING_SECONDS - now
        return self._pace.frame_wait(last, now)

    def frame(self, draft_id: int, said: str, status: str) -> bool:
        """Show what was said so far, and what goes on, once: the next frame is soon due, and an answer never waits for it.

        Return False when that has to be tried again.
        """
        text = "\n\n".join(filter(None, [tail(said, DRAFT_LIMIT - 300), tail(status, 200)])) or "…"
        call, place = self._telegram.call, {"chat": self._user_id, "message_thread_id": self._thread_id or None}
        try:
            if self._telegram.drafts:
                call(apihelper.send_message_draft, self._user_id, draft_id, whole_characters(text), can_stop=True,
                     keep_on_stop=True, **place)
            else:
                call(apihelper.send_chat_action, self._user_id, "typing", **place)
        except TelegramError as error:
            log.debug("A frame was not shown: %s", error)
            if NO_DRAFTS.search(str(error)):
                self._telegram.drafts = False
            return isinstance(error, Refused) and self._telegram.drafts        # the same again would be refused too
        return self._telegram.drafts

    # -- lasting messages ----------------------------------------------------------------------------------------------

    def parts(self, text: str) -> list[dict]:
        """Cut Kiro's text into parts (see Delivery); of too many, the first and the last, and a file with all of it."""
        self._gone = False                     # Telegram may have been wrong; it is asked again
        parts = plain_parts(text, "source")
        if self._rich and self._telegram.rich and has_markdown(text):
            pieces = split_text(resolved(text), RICH_LIMIT, RICH_SHORT, RICH_BLOCKS)
            parts = [{"kind": "rich", "text": piece} for piece in pieces]
        if len(parts) > PARTS_AT_MOST:
            caption = f"✂️ {len(parts) - 2 * PARTS_SHOWN} messages are left out here: this is the whole answer."
            parts[PARTS_SHOWN:-PARTS_SHOWN] = [{"kind": "whole", "text": whole_characters(text), "caption": caption}]
        return parts

    def send(self, part: dict, buttons: Optional[Buttons], **how: Any) -> list[dict]:
        """Send a part of an answer; return other parts when it has to be sent in their form instead.

        `how` is for how many `seconds` to insist, and whether to `disable_notification`.  Raises TelegramError.
        """
        kind, text, how["reply_markup"] = part["kind"], part["text"], markup(buttons)
        try:
            if kind == "rich":
                rich = types.InputRichMessage(markdown=rich_safe(text), skip_entity_detection=True)
                self._post(apihelper.send_rich_message, rich, **how)
            elif kind == "whole":
                file = ANSWER_FILE, io.BytesIO(text.encode())
                self._post(apihelper.send_data, file, data_type="document", caption=part["caption"], **how)
            else:
                shown, entities = plain_form(text) if kind == "source" else (text, None)
                self._post_plain(shown, entities=entities, **how)
        except Refused as refusal:
            return self._other_form(part, refusal)
        return []

    def _other_form(self, part: dict, refusal: Refused) -> list[dict]:
        """Return the parts to send in the place of one that was refused; there are none for a plain one: raises Refused."""
        log.warning("Telegram refused a %s part: %s", part["kind"], refusal)
        kind, text = part["kind"], part["text"]
        if kind == "rich" and refusal.code == 404:     # a server that lacks the method
            self._telegram.rich = False
        if len(text) > HALVED_AT_LEAST and TOO_MUCH.search(refusal.description):
            half = split_text(text, max(utf16_length(text) * 2 // 3, 1))
            return [{**part, "text": piece} for piece in half]
        if kind in ("rich", "whole"):
            return plain_parts(text, "source")
        if kind == "source":
            return [plain_part(text)]
        raise refusal

    def _post_plain(self, text: str, **how: Any) -> Any:
        return self._post(apihelper.send_message, text if text.strip() else "…", link_preview_options=NO_PREVIEW, **how)

    def _post(self, method: Callable[..., Any], content: Any, seconds: float, **kwargs: Any) -> Any:
        """Send into the topic; when Telegram does not take it there, to the chat itself, and say why."""
        insist = functools.partial(self._telegram.insist, chat=self._user_id, seconds=seconds)
        if self._thread_id and not self._gone:
            try:
                return insist(method, self._user_id, content, message_thread_id=self._thread_id, **kwargs)
            except Refused as refusal:
                reason = TOPIC_GONE.format(refusal.description)
                has_other_form = method is not apihelper.send_message or kwargs.get("entities") is not None
                if not ABOUT_TOPIC.search(refusal.description) and (
                        has_other_form or OTHER_FORM.search(reason) or refusal.code not in (400, 403)):
                    raise
            insist(apihelper.send_message, self._user_id, reason, disable_notification=True)
            self._gone = True
        return insist(method, self._user_id, content, **kwargs)

    def say(self, text: str, buttons: Optional[Buttons] = None, silent: bool = False, once: bool = False) -> Any:
        """Send a message of the bot's own, in several if it is long; return the last.  Raises TelegramError."""
        seconds = 0 if once else SAY_SECONDS
        *before, last = list(split_text(counted(text, QUESTION_LIMIT), PLAIN_LIMIT - 200)) or [""]     # room for an outcome
        for piece in before:
            self._post_plain(piece, seconds=seconds, disable_notification=True)
        return self._post_plain(last, reply_markup=markup(buttons), seconds=seconds, disable_notification=silent)

    def ask(self, text: str, buttons: Buttons) -> int:
        """Send a question once; return its message_id.  Raises TelegramError."""
        try:
            return self.say(text, buttons, once=True)["message_id"]
        except Refused:                        # buttons without colours may be taken
            buttons = [[(label, {**data, "style": None}) for label, data in row] for row in buttons]
            return self.say(text, buttons, once=True)["message_id"]

    def show(self, text: str, name: str) -> None:
        """Send a text as code, or as a file of this name where that is too long.  Raises TelegramError."""
        size = utf16_length(text)
        if size > PLAIN_LIMIT:
            self.upload(io.BytesIO(text.encode()), name)
        else:
            self._post_plain(text, seconds=SAY_SECONDS, entities=[types.MessageEntity("pre", 0, size, language="diff")])

    def settle(self, message_id: int, text: str) -> None:
        """Replace a message with buttons by its outcome."""
        self._telegram.insist(apihelper.edit_message_text, tail(text, PLAIN_LIMIT), chat_id=self._user_id,
                              message_id=message_id, chat=self._user_id, link_preview_options=NO_PREVIEW)

    def rename(self, title: str) -> None:
        """Give the topic a name."""
        self._telegram.insist(apihelper.edit_forum_topic, self._user_id, self._thread_id, title, chat=self._user_id)

    def react(self, message_id: int, emoji: str) -> None:
        """Show that a message was seen."""
        if self._pace.closed_for():
            return                             # in a 429 window nothing goes that the answer doesn't need
        self._telegram.call(apihelper.set_message_reaction, self._user_id, message_id, [types.ReactionTypeEmoji(emoji)],
                            chat=self._user_id)

    # -- files ---------------------------------------------------------------------------------------------------------

    def download(self, file: TelegramFile) -> Iterator[bytes]:
        """Yield a file's bytes.  Raises TelegramError, OSError."""
        if file.size > DOWNLOAD_LIMIT and not self._telegram.is_local:
            raise Refused(400, "file is too big: Telegram hands bots files of up to 20 MB only")
        return self._telegram.download(file.file_id, self._user_id)

    def upload(self, file: IO[bytes], path: str, caption: str = "", silent: bool = False) -> str:
        """Send as photo if Telegram takes it as such, else as document; return why not, or nothing."""
        size = file.seek(0, os.SEEK_END)
        if not size:
            return "it is empty"
        limit = LOCAL_UPLOAD_BYTES if self._telegram.is_local else UPLOAD_BYTES
        if size > limit:
            return f"it is larger than the {limit >> 20} MB that Telegram takes"
        file.seek(0)
        is_photo = size <= PHOTO_BYTES and image_type(file.read(16)) in ("image/png", "image/jpeg", "image/webp")
        named_file = harmless_name(os.path.basename(path)), file       # safe for its headers [tg 4]
        for send, how in [(apihelper.send_photo, {})] * is_photo + [(apihelper.send_data, {"data_type": "document"})]:
            try:
                self._post(send, named_file, ANSWER_SECONDS, caption=caption or None, disable_notification=silent, **how)
                return ""
            except Refused as refusal:
                reason = refusal.description
        return f"Telegram refused it: {reason}"


class Form:
    """The body of a request with a file, read piece by piece: requests would hold it all in memory, and twice."""

    def __init__(self, fields: dict[str, Any], field: str, named_file: tuple[str, IO[bytes]]) -> None:
        (name, self._file), place = named_file, secrets.token_bytes(16)
        body, content_type = urllib3.encode_multipart_formdata({**fields, field: (name, place)})
        self._head, self._tail = body.split(place)
        self._size = self._file.seek(0, os.SEEK_END)
        self.headers = {"Content-Type": content_type}

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes, exactly as many as were promised.  Raises FileRefused."""
        yield self._head
        self._file.seek(0)
        left = self._size
        while data := self._file.read(min(left, UPLOAD_CHUNK)):
            left -= len(data)
            yield data
        if left:
            raise FileRefused("it became shorter while it was sent")
        yield self._tail


class FileRefused(Exception):
    """A file that Kiro wants to send must not be sent; the text completes "but ..."."""


def open_inside(path: str, workspace: str) -> IO[bytes]:
    """Open a regular file inside the workspace, links resolved.  Raises FileRefused, OSError, ValueError."""
    try:
        found = os.open(os.path.join(workspace, path), os.O_PATH)      # only looked at, so that no link can change meanwhile
    except FileNotFoundError as error:
        raise FileRefused("there is no such file") from error
    try:
        seen, root = f"/proc/self/fd/{found}", os.path.realpath(workspace)
        if os.path.commonpath([os.readlink(seen), root]) != root:
            raise FileRefused("it is outside of this topic's folder")
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise FileRefused("it is not a regular file")
        return open(seen, "rb")
    finally:
        os.close(found)


# ======================================================================================================================
# Text: how much there is of it, and what may be shown
# ======================================================================================================================

def utf16_length(text: str) -> int:
    """Return the length in UTF-16 units, as Telegram's clients count."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def one_line(text: str, limit: int) -> str:
    """Return the text in plain sight on one line, shortened."""
    return shortened(in_plain_sight(" ".join(text.split())), limit)


def duration(seconds: float) -> str:
    """Return a time as people write it: 45 s, 1 m 35 s, 2 h 5 m."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} m" if hours else f"{minutes} m {rest} s" if minutes else f"{rest} s"


def title_of(text: str) -> str:
    """Return a text's first line as a title: cut at a word, without what shows nothing."""
    text = text.partition(LESSON_START)[0].strip()
    line = "".join(filter(str.isprintable, " ".join(text.partition("\n")[0].split())))
    return line if len(line) <= TITLE_LIMIT else (line[:TITLE_LIMIT].rpartition(" ")[0] or line[:TITLE_LIMIT - 1]) + "…"


def whole_characters(text: str) -> str:
    """Join surrogate halves, which arrive apart when an emoji lies across two chunks; replace what is left of them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def in_plain_sight(text: str) -> str:
    """Return the text with characters spelled out that show nothing, or turn the direction of what follows."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}"
                   for c in whole_characters(text))


def shortened(text: str, limit: int) -> str:
    """Return the text, or its beginning with an ellipsis."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def tail(text: str, limit: int) -> str:
    """Return the end of the text, at most so many UTF-16 units, from the start of a line if possible."""
    if utf16_length(text) <= limit:
        return text
    end = text[-limit:].encode("utf-16-le", "surrogatepass")[2 - 2 * limit:].decode("utf-16-le", "ignore")
    line = end.find("\n")
    return "…" + (end[line + 1:] if 0 <= line < len(end) // 2 else end)


# ======================================================================================================================
# Markdown: what Kiro writes, made safe and cut to size
# ======================================================================================================================

# `read` goes through a text once, as GitHub's Markdown has it, and says of each line what it is part of.  Everything else asks
# it: what is code, where to cut, what a message costs, what is closed at its end.  `signs` then looks for SIGN in one paragraph
# or cell at a time.
#
# `re` holds the interpreter's lock while it searches, so each pattern must be linear on any text: no inner part can be read in
# two ways, and what is looked for in vain ends before another of its kind, at a line's end, or after 2000 characters.

# What a line begins with, matched at one place of it: a quote or an item; in a paragraph, only some are one.
LINE = r"[ ]{0,3}(?P<sign>[-*_])(?:[ \t]*(?P=sign)){2,}[ \t]*$"
QUOTE = r"[ ]{0,3}>[ \t]?"
BOX = re.compile(rf"(?!{LINE})(?:{QUOTE}|[ ]{{0,3}}(?:\d{{1,9}}[.)]|[-+*])(?:[ \t]{{1,4}}(?=\S)|[ \t]|$))")
BOX_IN_TEXT = re.compile(rf"(?!{LINE})(?:{QUOTE}|[ ]{{0,3}}(?:1[.)]|[-+*])(?:[ \t]{{1,4}}(?=\S)|[ \t](?=[ \t]+\S)))")
NO_BOX = re.compile(r"(?!)")     # in code

# What else a line is.
LEAF = re.compile(rf"""
      (?P<line>{LINE})
    | (?P<blank>[ \t]*$)
    | (?P<heading>[ ]{{0,3}}\#{{1,6}}(?=[ \t]|$))
    | (?P<fence>[ ]{{0,3}}(?:`{{3,80}}(?=[^`]*$)|~{{3,80}}(?!~)))
    | (?P<indented>[ ]{{4}}|[ ]*\t)
    | (?P<text>)""", re.X)
FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})[ ]*(\S*)")
RULE = re.compile(r"(?=.*\|)\|?(?:[ \t]*:?-+:?[ \t]*\|)*[ \t]*(?::?-+:?)?")     # the line below a table's head
CELL = re.compile(r"(?:\\.|[^\\|\n])+|(?<=\|)(?=\|)")

# The signs in a paragraph or a cell, one after the other: a run of ` is tried for 2000 characters, a bracket to the next one, a
# target to a blank or its ninth pair of parentheses, a title to a quote.
CODE_SPAN = r"(?P<code>(?<!`)(?P<ticks>`+)(?!`)(?:[^\n]|\n(?![ \t>]*\n)){0,2000}?(?<!`)(?P=ticks)(?!`))"
LABEL = r"(?:\\.|`[^`\n]*`|!\[[^\[\]]*\]\([^()\s]*\)|(?<!!)\[[^\[\]]*\](?!\()|[^\[\]\\`!]|!(?!\[))*"
# What ends an address in a sentence, in any script.
STOP = r"\s\\<>\"`|\[\]()“”„‘’…«»‹›،؛؟।、-〃〈-〟！-／：-？［-］｛-･"
SIGN = re.compile(rf"""
    (?P<escape>\\[!-/:-@\[-`{{-~]) | {CODE_SPAN}
    | (?P<link>(?P<image>!?)\[(?P<label>{LABEL})\]\([ ]{{0,3}}(?:<(?P<angle>[^<>\n]*)>|(?P<target>(?!<)[^\s()]*
        (?:\([^\s()]*\)[^\s()]*){{0,8}}))(?:[ ]{{1,3}}(?:"[^"\n]*"|'[^'\n]*'))?[ ]{{0,3}}\))
    | (?P<newline>\\\n|(?<![ ]{{2}})\n)
    | (?P<start>(?:^[ \t>]*|(?<=[-+*.)>][ ]))(?=\#{{1,6}}[^\s\#]|\[(?!\^)[^\[\]\n]+\]:))
    | (?P<address>(?<![a-zA-Z\d])<?https?://(?:[^*{STOP}]|\*(?!\*)|\([^{STOP}]*\))+>?)
    | (?P<br>(?<!\s)<br[ ]*/?>|<br[ ]*/?>$)
    | (?P<empty>(?<=\|)\Z)
    | (?P<mark>`+|\$|<|==+|\|\|+|!(?=\[|<?https?://)|(?<=\])\()""", re.M | re.X)
WORDS = {"text": re.compile(".+", re.S), "heading": re.compile(".+"), "head": CELL}     # where signs belong together

DEPTH_AT_MOST = 8               # of quotes and items; a list in a list has two levels of Telegram's 16 [tg 2.1]
COLUMNS_AT_MOST = 20
ENTITIES_AT_MOST = 100
CLOSING_AT_MOST = 300           # characters at a message's end: a fence in its boxes, a remark

RANKS = {"blank": 0, "underline": -1, "rule": -1}
Boxes = tuple[str, ...]         # open quotes and items, each as the mark that it began with


class Line(NamedTuple):
    """A line, and what it is part of."""

    start: int
    at: int                     # where its words start, behind the marks of quotes and items
    end: int
    kind: str                   # blank, text, underline, heading, line, fence, code, end, indented, head, rule, row
    block: int                  # where the words of its block's first line start
    rank: int                   # of a cut before it: 4 after a blank line, 3 between blocks, 2 in an item, 1 in a block, 0 in a
                                # line, -1 none
    cost: int                   # how many of Telegram's blocks begin here
    boxes: Boxes


def read(text: str) -> list[Line]:
    """Return the lines of a text, and what each is part of."""
    last, lines = Line(0, 0, -1, "blank", 0, 0, 0, ()), []
    for words in text.removesuffix("\n").split("\n"):
        start = last.end + 1
        line = read_line(text, last, start, start + len(words))
        if line.kind == "rule":
            lines[-1] = last._replace(kind="head", block=last.at, rank=max(last.rank, 2), cost=last.cost + 1)
        lines.append(line)
        last = line
    return lines


def read_line(text: str, last: Line, start: int, end: int) -> Line:
    """Return what the line behind another one is."""
    going, boxes, at = enter(text, last, start, end)
    inside, begun = going == len(last.boxes), len(boxes) - going
    kind = LEAF.match(text, at, end).lastgroup if begun else kind_behind(text, last, at, end, inside)
    if not begun and (kind in ("code", "end", "row") or kind == last.kind in ("text", "indented")):
        return Line(start, at, end, kind, last.block, -1 if kind == "end" else 1, kind == "row", last.boxes)
    in_item = any(box != "> " for box in boxes[:going])
    rank = RANKS.get(kind, 2 if in_item else 3 + (last.kind == "blank"))
    cost = begun + max(0, len(boxes) - len(last.boxes)) + (kind != "blank")      # items, their lists, words
    return Line(start, at, end, kind, last.at if kind == "rule" else at, rank, cost, boxes)


def kind_behind(text: str, last: Line, at: int, end: int, inside: bool) -> str:
    """Return what a line is that begins no box, `inside` those of the last one or not."""
    kind, words = LEAF.match(text, at, end).lastgroup, text[at:end].strip()
    if inside and last.kind in ("fence", "code"):
        fence = FENCE.match(text, last.block)[1]
        return "end" if words.startswith(fence) and not words.strip(fence[0]) and kind != "indented" else "code"
    if inside and last.kind == "text":
        if words and (not words.strip("=") or not words.strip("-")):
            return "underline"
        if RULE.fullmatch(words) and columns(words) == columns(text[last.at:last.end]):
            return "rule"
    if inside and last.kind in ("rule", "row") and kind == "text":
        return "row"
    return "text" if last.kind == "text" and kind == "indented" else kind


def enter(text: str, last: Line, at: int, end: int) -> tuple[int, Boxes, int]:
    """Return how many of the last line's boxes go on in a line, all that it is in, and where its words start."""
    going = 0
    for box in last.boxes:
        goes_on = QUOTE if box == "> " else rf"[ ]{{{len(box)}}}|\t|(?=[ \t]*$)"
        match = re.compile(goes_on).match(text, at, end)
        if not match:
            break
        going, at = going + 1, match.end()
    boxes, begins = last.boxes[:going], BOX
    if boxes == last.boxes:
        begins = {"text": BOX_IN_TEXT, "fence": NO_BOX, "code": NO_BOX}.get(last.kind, BOX)
    match = begins.match(text, at, end)
    while match and len(boxes) < DEPTH_AT_MOST:
        boxes, at = (*boxes, "> " if ">" in match[0] else match[0]), match.end()
        match = BOX.match(text, at, end)
    return going, boxes, at


def margin(line: Line) -> str:
    """Return how a line begins that is in the same quotes and items."""
    return re.sub("[^>]", " ", "".join(line.boxes))


def columns(row: str) -> int:
    """Return how many cells a table's line has."""
    return len(CELL.findall(row.strip()))


def signs(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield what is no plain word, and where: code and tables as their lines, and matches of SIGN in paragraphs and cells."""
    for _, block in itertools.groupby(read(text), lambda line: line.block):
        lines = list(block)
        kind, start, end = lines[0].kind, lines[0].at, lines[-1].end
        if kind in ("fence", "indented", "head"):
            yield start, end, lines
        for words in WORDS[kind].finditer(text, start, end) if kind in WORDS else ():
            yield from ((*sign.span(), sign) for sign in SIGN.finditer(text, *words.span()))


def code_in(text: str, tables: bool = False) -> Iterator[tuple[int, int, str, dict]]:
    """Yield where code is, and tables if wanted; what it shows, and as which entity."""
    for start, end, what in signs(text):
        if isinstance(what, re.Match):
            if what["code"]:
                yield start, end, what[0].strip("`"), {"type": "code"}
        elif tables or what[0].kind != "head":
            inner = "\n".join(text[line.at:line.end] for line in what if line.kind not in ("fence", "end"))
            fence = FENCE.match(text, start)
            yield start, end, inner, {"type": "pre", "language": fence[2] if fence else ""}


def without_code(text: str) -> str:
    """Return the text with all code blotted out."""
    return changed(text, ((start, end, "`" * (end - start)) for start, end, *_ in code_in(text)))


def changed(text: str, changes: Iterable[tuple[int, int, str]]) -> str:
    """Return the text with words in the place of what is from start to end, in order; not those inside of another one."""
    shown, at = [], 0
    for start, end, new in changes:
        if start >= at:
            shown += text[at:start], new
            at = end
    return "".join(shown) + text[at:]


FORMATTED = re.compile(r"`[^`\n]+`|\]\(\S|\]:[ ]*<?https?:|~~[^\s~][^~\n]*~~|\*\*(?![\s*./])[^*\n]*[^\s*/]\*\*"
                       r"|(?<![\w*/])\*(?![\s*./])[^*\n]*[^\s*/]\*(?![\w*])|(?<![\w/])_(?![\s_])[^_\n]*[^\s_]_(?!\w)"
                       r"|(?<![\w/])__(?![\s_]|[a-z\d]*__)[^_\n]*[^\s_]__(?!\w)")


def has_markdown(text: str) -> bool:
    """Is there anything to format, and no deeper than Telegram takes it?"""
    lines = read(text)
    return max(len(line.boxes) for line in lines) < DEPTH_AT_MOST and (
        any(line.boxes or line.kind not in ("blank", "text") for line in lines) or bool(FORMATTED.search(text)))


def plain_form(text: str) -> tuple[str, list[dict]]:
    """Return the text with code and tables marked by entities instead of by signs; what is too much for that stays."""
    shown, entities, at = "", [], 0
    for start, end, inner, entity in code_in(text, tables=True):
        if start >= at and inner.strip() and len(entities) < ENTITIES_AT_MOST:
            shown += text[at:start]
            entities.append({**entity, "offset": utf16_length(shown), "length": utf16_length(inner)})
            shown, at = shown + inner, end
    return shown + text[at:], entities


# -- files in the text -------------------------------------------------------------------------------------------------

FILE_TAG = re.compile(r"""(?P<before>[^\s>][ ]?)?(?P<tag><send_file\s+path\s*=\s*"""
                      r"""(?P<path>"[^"<>\n]*"|'[^'<>\n]*'|[^\s"'<>]+?)(?:\s[^<>]*?)?"""
                      r"""(?:/>|>(?:(?P<caption>(?:(?!<send_file\b).)*?)</send_file>)?))(?=(?P<after>[ ]?[^\s<])?)""", re.S)
CUT_TAG = re.compile(r"<send_file\s+path\s*=[^<>]*\Z")
UNFINISHED = re.compile(r"<send_file\s(?:(?!<send_file\s|</send_file>|/>).)*\Z|<s?e?n?d?_?f?i?l?e?\Z", re.S)


def visible_text(text: str, still_coming: bool = False,
                 exists: Callable[[str], bool] = lambda path: True) -> tuple[str, list[tuple[str, str]]]:
    """Return the text without its file tags, and the (path, caption) of each; a tag in code is text, and so is one in the
    midst of a sentence whose file does not exist.  An unfinished tag at the end is hidden, while the text is still coming
    also one whose caption may come.
    """
    if "<" not in text:
        return text, []
    files, changes = [], []
    uncoded = (UNFINISHED if still_coming else CUT_TAG).sub("", without_code(text))
    for match in FILE_TAG.finditer(uncoded):
        path = match["path"].strip("\"' ")
        if not match["before"] or not match["after"] or exists(path):
            files.append((path, text[slice(*match.span("caption"))].strip()))
            changes.append((*match.span("tag"), ""))
    return changed(text[:len(uncoded)], changes).strip("\n"), files


# -- rich messages -----------------------------------------------------------------------------------------------------


IMAGE = re.compile(r"!\[([^\[\]]*)\]\([^()\s]*\)")
REFERENCE = re.compile(r"(?<!\\)(?P<image>!?)\[(?P<label>[^\[\]\n]+)\](?:\[(?P<name>[^\[\]\n]*)\]|(?![(\[:]))")
DEFINITION = re.compile(r"""^[ \t>]*\[(?!\^)(?P<name>[^\[\]\n]+)\]:[ \t]*<?(?P<url>[^\s<>`]+)>?"""
                        r"""(?:[ \t]+(?:"[^"\n]*"|'[^'\n]*'))?[ \t]*$""", re.M)
SAFE_URL = re.compile(r"https?://(?:[\w.-]+\.(?:[A-Za-z][A-Za-z\d-]+|[^\W\d_A-Za-z]{2,})|\d{1,3}(?:\.\d{1,3}){3})(?::\d{1,5})?"
                      r"(?:[/?#]\S*)?|tg://\w\S*|mailto:[\w.+-]+@[\w-]+\.[\w.-]+")


def rich_safe(text: str) -> str:
    """Return Markdown that Telegram neither refuses nor garbles, and that makes it fetch nothing [tg 2.1-2.3]."""
    text, changes = resolved(text), []
    for start, end, what in signs(text):
        if isinstance(what, re.Match):
            changes.append((start, end, safe_sign(what)))
        elif what[0].kind == "head" and columns(text[start:what[0].end]) > COLUMNS_AT_MOST:
            indent = margin(what[0])
            changes.append((start, end, f"```\n{indent}{text[start:end]}\n{indent}```"))
    return changed(text, changes)


def safe_sign(sign: re.Match[str]) -> str:
    """Return what stands for a sign; code and escapes stay as they are."""
    kind, words = sign.lastgroup, sign[0]
    if kind == "link":
        return safe_link(sign)
    if kind == "address":
        words = words.strip("<>")
        url = words.rstrip(".,;:!?'*~" + "_" * sign.string.endswith("_", 0, sign.start()))      # what ends the sentence
        return linked(escaped(url), url) + words[len(url):]
    if kind == "mark":
        return escaped(words)
    return {"start": words + "\\", "newline": "  \n", "br": " ", "empty": " "}.get(kind, words)


def safe_link(link: re.Match[str]) -> str:
    """Return a link that Telegram takes, or else label and target as text: a relative path would refuse it all."""
    target, words = link["angle"] or link["target"] or "", link["label"].strip("`* ")
    label = SIGN.sub(lambda sign: escaped(sign[0]) if sign["address"] else safe_sign(sign), IMAGE.sub(r"\1", link["label"]))
    if SAFE_URL.fullmatch(target):
        return linked(label if words else escaped(target), target)
    if re.match(r"[\w)\]]", link.string[link.start() - 1:link.start()]):
        return f"\\[{label}]\\({target})"      # f[a](b)
    if not words or f"/{target}".partition("#")[0].endswith(f"/{words}"):
        return linked("", target)
    return f"{label} ({linked('', target)})" if target else label


def linked(label: str, url: str) -> str:
    """Return a link, or what can't be one as code."""
    if SAFE_URL.fullmatch(url):
        return f"[{label}]({url.replace('$', '%24')})"
    return f"`{url.replace('`', '')}`" if url.strip("`") else ""


def escaped(words: str) -> str:
    """Return the words with all signs escaped."""
    return re.sub(r"([\\`*_\[\]($>=|~!])", r"\\\1", words).replace("<", "&lt;")


def resolved(text: str) -> str:
    """Return the text with the targets in its links that are defined on lines of their own."""
    words, changes = without_code(text) if "]:" in text else "", set()
    defined = {definition["name"].lower(): definition for definition in DEFINITION.finditer(words)}
    for link in REFERENCE.finditer(words):
        definition = defined.get((link["name"] or link["label"]).lower())
        if definition:
            changes |= {(link.end("label") + 1, link.end(), f"({definition['url']})"), (*definition.span(), "")}
    return changed(text, sorted(changes))


# -- cutting -----------------------------------------------------------------------------------------------------------


def split_text(text: str, limit: int, short: float = math.inf, cost: float = math.inf) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` UTF-16 units and of at most that `cost`, and of at most `short` where there
    are blank lines: each is cut at its last line of the best rank, and goes on in the same quotes, items, code or table."""
    room, first = limit - min(limit // 2, CLOSING_AT_MOST), 0
    lines = list(short_lines(text, max(room // 10, 1)))

    def end_of_piece(used: int) -> int:
        """Return the line before which the piece ends that begins with the first one left, and some more."""
        cut, best, blocks = 0, 0, 0
        for n, line in enumerate(lines[first:first + room], first):
            if n > first and line.rank >= best:
                cut, best = n, line.rank
            used += utf16_length(text[line.start:line.end]) + 1
            blocks += line.cost
            if cut and (used > room or blocks > cost or used > short and best == 4):
                return cut
        return len(lines)

    while first < len(lines):
        line = lines[first]
        opening, rows = "".join(line.boxes), {"code": 1, "row": 2}.get(line.kind)
        if rows:
            head = "\n".join(text[line.block:line.start].split("\n", rows)[:rows])
            opening += f"{head}\n{margin(line)}" * (utf16_length(head) < room // 2)
        first = end_of_piece(utf16_length(opening))
        last, closing = lines[first - 1], ""
        words = text[line.at:last.end]
        if last.kind in ("fence", "code"):
            closing = margin(last) + FENCE.match(text, last.block)[1]
        if words.strip():
            yield f"{opening}{words}\n{closing}".strip("\n")


def short_lines(text: str, width: int) -> Iterator[Line]:
    """Yield the lines of a text, those that are too long in several, cut at spaces."""
    for line in read(text):
        while line.end - line.at > width:
            cut = text.rfind(" ", line.at + width // 2, line.at + width) + 1 or line.at + width
            yield line._replace(end=cut)
            line = line._replace(start=cut, at=cut, rank=0, cost=0)
        yield line


# ======================================================================================================================
# Running: start, stop, the console, the check
# ======================================================================================================================

TELEGRAM_SECONDS = 5 * 60       # how long to wait for Telegram at the start
PURGE_SECONDS = 6 * 3600
HEARTBEAT_SECONDS = 0.5         # between two signs of life of the main thread
FROZEN_SECONDS = 2              # of processor time without one: something holds the interpreter's lock, and stops everybody
STOP_SIGNALS = [signal.SIGTERM, signal.SIGHUP]
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:      # nohup
    STOP_SIGNALS.remove(signal.SIGHUP)
CHECK_SECONDS = 3
VERSION_SECONDS = 10
TOPICS_OFF = "off (switch them on: @BotFather, Bot Settings, Threaded Mode); until then there is one conversation"
NOBODY = "nobody yet (ALLOWED_TELEGRAM_IDS is empty): write to the bot, it tells you your id"
TOLD_BYTES = 100_000
TOLD_AT_MOST = 20               # messages that wait in one topic
CONSOLE_USER = CONSOLE_THREAD = 0
PRINT_SECONDS = 0.05            # between two pieces of an answer in the console
CONSOLE_HELP = "\n".join(["Just write; Kiro answers. A pasted text is one message.",
                          "Ctrl-C stops the turn; exit, quit or Ctrl-D leave.",
                          *(f"/{name:8} {what}" for name, what in COMMANDS.items())])


class StartError(Exception):
    """The bot can't run; the text is one line that says why."""


def lock_folder(folder: Path) -> None:
    """Make sure that this is the folder's only bot, until the program ends.  Raises StartError."""
    descriptor = os.open(folder, os.O_RDONLY)      # never closed: it holds the lock
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartError(f"Another bot is running in {folder}") from error
    except OSError as error:                       # a network's file system, as a rule
        log.warning("%s can't be locked (%s): see to it that no second bot runs there", folder, error.strerror)


def make_folder(settings: Settings) -> str:
    """Make the folder for the workspaces, for its owner only, and all that it is about private; return it.

    Raises SettingsError.
    """
    try:
        settings.workspaces.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(settings.workspaces, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
    except OSError as error:
        raise SettingsError(f"WORKSPACE_BASE_PATH: {settings.workspaces} can't be used: {error.strerror}") from error
    for folder in settings.allowed_folders:
        if not os.path.isdir(folder):          # it may come
            log.warning("ALLOWED_FOLDERS: there is no folder %s", folder)
    make_private(settings.folder / ".env", settings.folder / DATABASE)
    return str(settings.workspaces)


def make_private(*paths: Path) -> None:
    """Take group's and others' rights off the files that hold the token or the conversations."""
    for path in paths:
        if path.exists() and path.stat().st_mode & 0o077:
            try:
                path.chmod(path.stat().st_mode & ~0o077)
                log.info("Made %s readable by its owner only", path.name)
            except OSError as error:
                log.warning("%s is readable by others: %s", path, error.strerror)


def kiro_version(settings: Settings) -> str:
    """Return what Kiro's command says of its version.  Raises StartError when it is not there."""
    program = shutil.which(settings.kiro_command[0])
    if program is None:
        raise StartError(f"KIRO_COMMAND: {settings.kiro_command[0]} is not found; install Kiro CLI or name it by its path")
    if "kiro-cli" not in os.path.basename(program):
        return " ".join(settings.kiro_command)
    mark = f"version.{os.getpid()}"
    try:
        process = subprocess.Popen([program, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, start_new_session=True, env=child_environment(settings, mark))
        said, _ = process.communicate(timeout=VERSION_SECONDS)
    except OSError as error:
        raise StartError(f"KIRO_COMMAND: {program} can't be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        end_processes(lambda: running(lambda pid: belongs(pid, mark, process.pid)), TERM_SECONDS)
        raise StartError(f"KIRO_COMMAND: {program} --version does not answer; try it in a terminal") from error
    return f"{said.strip() or 'of unknown version'} ({program})"


def get_me(telegram: Telegram, seconds: float) -> dict:
    """Return the bot's own user, waiting so long for Telegram.  Raises SettingsError, StartError."""
    limit, failures = time.monotonic() + seconds, 0
    while True:
        try:
            return telegram.call(apihelper.get_me)
        except Refused as refusal:
            if refusal.code in (401, 404):
                raise SettingsError("BOT_TOKEN is not accepted by Telegram: get the current one from @BotFather") from refusal
            raise StartError(f"Telegram refuses: {refusal}") from refusal
        except (Unreachable, TooManyRequests) as error:
            delay = getattr(error, "seconds", retry_delay(failures))
            if time.monotonic() + delay > limit:
                raise StartError(f"Telegram can't be reached at TELEGRAM_API_URL: {error}") from error
            log.log(logging.DEBUG if failures else logging.WARNING, "Telegram can't be reached: %s; trying again", error)
            failures += 1
            telegram.pause(delay)


def describe_bot(me: dict) -> str:
    """Say who the bot is, and whether its private chats have topics, or how to get them."""
    topics = "on" if me.get("has_topics_enabled") else TOPICS_OFF
    return f"@{me.get('username')}, topics are {topics}"


def describe_allowed(settings: Settings) -> str:
    """Say who may use the bot."""
    return ", ".join(map(str, sorted(settings.allowed))) or NOBODY


def describe_database(settings: Settings) -> str:
    """Say what is in the database.  Raises StartError, StoreError."""
    path = settings.folder / DATABASE
    if not path.exists():
        return f"{path} will be made"
    with open_store(settings) as store:
        return f"{path}, {len(store.session_ids())} sessions"


def findings(settings: Settings, telegram: Telegram, seconds: float) -> list[tuple[str, Callable[[], str]]]:
    """Return what to look at, with the functions that do: they say what they found, waiting so long for Telegram.

    They raise SettingsError, StartError, StoreError.
    """
    return [("Kiro", lambda: kiro_version(settings)),
            ("pyTelegramBotAPI", lambda: telebot_version),
            ("Bot", lambda: describe_bot(get_me(telegram, seconds))),
            ("Allowed", lambda: describe_allowed(settings)),
            ("Folder", lambda: make_folder(settings)),
            ("Database", lambda: describe_database(settings))]


def serve(settings: Settings) -> int:
    """Run the bot until it is told to stop; return the exit status."""
    lock_folder(settings.folder)
    make_folder(settings)
    with open_store(settings) as store:
        bot = Bot(settings, store)
        os.set_blocking(bot.bell_handle, False)
        signal.set_wakeup_fd(bot.bell_handle)
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, lambda *_: None)     # the bell rings
        threading.Thread(target=run, args=(bot,), name="poll", daemon=True).start()
        faulthandler.register(signal.SIGPROF, chain=True)      # says where it hung, then the signal's default: the end
        purge_at = 0.0
        signal.setitimer(signal.ITIMER_PROF, FROZEN_SECONDS)
        while not bot.rings(HEARTBEAT_SECONDS):
            signal.setitimer(signal.ITIMER_PROF, FROZEN_SECONDS)
            if time.monotonic() > purge_at:
                purge_at = time.monotonic() + PURGE_SECONDS
                purge(store)
        bot.shut_down()
    log.info("Stopped")
    return bot.exit_status


def run(bot: Bot) -> None:
    """Say what was found, take up what was left, poll."""
    try:
        announce(bot)
        bot.recover()
        Poll(bot).run()
    except (SettingsError, StartError, StoreError) as error:
        bot.quit(2 if isinstance(error, SettingsError) else 1, str(error))
    except Closing:
        pass
    except Exception:   # without a poll there is no bot: let whoever restarts it know
        log.exception("Polling has failed")
        bot.quit(1, "Stopping")


def announce(bot: Bot) -> None:
    """Say in one line each what was found, waiting for Telegram.  Raises SettingsError, StartError, StoreError, Closing."""
    for name, find in findings(bot.settings, bot.telegram, TELEGRAM_SECONDS):
        try:
            log.info("%s: %s", name, find())
        except StartError as error:
            if name != "Kiro":       # it may be installed while the bot runs
                raise
            log.error("%s", error)
    bot.errand("menu", bot.telegram.call, apihelper.set_my_commands, [types.BotCommand(*item) for item in COMMANDS.items()])


def purge(store: SessionStore) -> None:
    """Forget old messages."""
    try:
        store.purge()
    except StoreError as error:
        log.error("Old messages can't be purged: %s", error)


def open_store(settings: Settings, kind: type[SessionStore] = SessionStore) -> SessionStore:
    """Return the database.  Raises StartError."""
    path = settings.folder / DATABASE
    try:
        return kind(str(path))
    except StoreError as error:
        raise StartError(f"The database {path} can't be used: {error}") from error


# -- the console -------------------------------------------------------------------------------------------------------

class Terminal(Topic):
    """A terminal in the place of a topic: what Kiro says is printed as it comes."""

    def __init__(self, telegram: Telegram) -> None:
        super().__init__(telegram, CONSOLE_USER, CONSOLE_THREAD, rich=False)
        self._shown = ""                       # of the answer that comes
        self._asked = ""                       # the last question
        self.choices: dict[str, str] = {}      # of an open question: number and data of its buttons

    def frame_wait(self, last: Optional[float], now: float) -> float:
        return max(0.0, last + PRINT_SECONDS - now) if last else 0

    def frame(self, draft_id: int, said: str, status: str) -> bool:
        self._print(said)
        self._shown = said
        return True

    def parts(self, text: str) -> list[dict]:
        return [plain_part(text)]

    def send(self, part: dict, buttons: Optional[Buttons], **how: Any) -> list[dict]:
        super().send(part, None, **how)        # without buttons: here nobody can press them
        self._shown = ""
        return []

    def _post_plain(self, text: str, reply_markup: Optional[types.InlineKeyboardMarkup] = None, **how: Any) -> dict:
        """Print a text, and its buttons with what can be written in their place."""
        lines = [f"  {button.text:40} {''.join(button.callback_data.partition(':/')[1:])[1:]}"
                 for row in (reply_markup.keyboard if reply_markup else ()) for button in row if button.callback_data]
        self._print("\n".join([text, *map(str.rstrip, lines), ""]))
        return {"message_id": 1}

    def _print(self, text: str) -> None:
        """Print a text, without what of it is there already."""
        is_new = not text.startswith(self._shown)
        print("\n" + text if is_new else text[len(self._shown):], end="", flush=True)

    def ask(self, text: str, buttons: Buttons) -> int:
        numbered = list(enumerate((button for row in buttons for button in row), 1))
        message_id = super().ask("\n".join([text, *(f"  {n}. {label}" for n, (label, _) in numbered)]), [])
        self.choices = {str(n): data["callback_data"] for n, (_, data) in numbered if "callback_data" in data}
        self._asked = text
        return message_id

    def settle(self, message_id: int, text: str) -> None:
        if text.startswith(self._asked):       # else the next one is asked already
            self.choices = {}
        print(text.splitlines()[-1], flush=True)

    def upload(self, file: IO[bytes], path: str, caption: str = "", silent: bool = False) -> str:
        print(f"[file: {path}] {caption}", flush=True)
        return ""


class Console(Bot):
    """Talks to Kiro in this terminal, as user 0 in thread 0.  It may run beside a bot: its messages are journaled in
    memory, and it touches nobody's locks and processes but its own."""

    def __init__(self, settings: Settings, store: SessionStore) -> None:
        super().__init__(settings, store)
        self.help = CONSOLE_HELP
        self._terminal = Terminal(self.telegram)
        self.own = self.conversation(CONSOLE_USER, CONSOLE_THREAD)

    def chat(self, user_id: int, thread_id: int) -> Topic:
        return self._terminal

    def talk(self) -> None:
        """Take each line, or pasted text, as one message, until the input's end."""
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                text = input(prompt).strip()
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print()
                continue
            if text in ("exit", "quit"):
                return
            if text:
                self.say_as(CONSOLE_USER, CONSOLE_THREAD, text)
                self._attend()

    def _attend(self) -> None:
        """Wait for the answer; ask what Kiro asks; Ctrl-C stops the turn."""
        while self.own.turn or self._errands:
            try:
                time.sleep(0.01)
                if self._terminal.choices:
                    self._decide(self._terminal.choices)
            except (KeyboardInterrupt, EOFError):
                self.own.stop()

    def _decide(self, choices: dict[str, str]) -> None:
        """Read the number of a button, and press it; anything else may be the answer itself."""
        text = input(f"Choose 1-{len(choices)}: ").strip()
        if data := choices.get(text):
            _, token, number = data.split(":")
            self._terminal.choices = {}
            self.questions.decide(CONSOLE_USER, token, int(number), 1)
        elif text:
            self.questions.hear(self.own.key, text)


class ConsoleStore(SessionStore):
    """Sessions of the real database, the journal in memory: a bot beside the console must not find its messages."""

    def __init__(self, path: str) -> None:
        super().__init__(":memory:")
        self._sessions = SessionStore(path)
        for name in ("get_session", "upsert_session", "set_model", "delete_session", "get_note", "set_note", "note_used",
                     "used_sessions", "owner"):
            setattr(self, name, getattr(self._sessions, name))

    def close(self) -> None:
        self._sessions.close()
        super().close()


def edit_lines() -> None:
    """Give `input` arrow keys and a history, and make a pasted text one line of it."""
    try:
        import readline     # not every Python has it
        readline.parse_and_bind("set enable-bracketed-paste on")
    except ImportError:
        pass


def console(settings: Settings) -> int:
    """Run the console; return the exit status."""
    if settings.log_level != "DEBUG":
        logging.disable(logging.ERROR)         # what goes wrong is said in the conversation
    make_folder(settings)
    if sys.stdin.isatty():
        edit_lines()
        print("Talk to Kiro. /help tells the commands; Ctrl-C stops the turn, Ctrl-D leaves.")
    try:
        kiro_version(settings)
    except StartError as error:
        print(f"{error}. A stand-in answers without it: KIRO_COMMAND='python test_sessions.py' python bot.py --console")
    with open_store(settings, ConsoleStore) as store:
        bot = Console(settings, store)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: sys.exit(0))
        try:
            bot.talk()
        finally:
            bot.shut_down()
    return 0


# -- the check ---------------------------------------------------------------------------------------------------------

def check(settings: Settings) -> int:
    """Try everything once and print what was found; return 0 when all is well, else 1."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)     # as Ctrl-C: nothing is left behind
    telegram = Telegram(settings, threading.Event())
    steps = [*findings(settings, telegram, CHECK_SECONDS),
             ("Handshake", lambda: handshake(settings)),
             ("Locks", lambda: check_locks(settings))]
    failed = 0
    for name, step in steps:
        try:
            print(f"ok    {name}: {step()}", flush=True)
        except (SettingsError, StartError, StoreError, KiroFailure) as error:
            failed += 1
            print(f"FAIL  {name}: {error}", flush=True)
    print("All is well." if not failed else f"{failed} to mend.")
    return 1 if failed else 0


def handshake(settings: Settings) -> str:
    """Start Kiro in a temporary folder, make a session, and say what it offers.  Raises KiroFailure, SettingsError."""
    make_folder(settings)      # inside it: a sandbox may hide /tmp and everything else
    with tempfile.TemporaryDirectory(prefix=".check-", dir=settings.workspaces) as folder, SessionStore(":memory:") as store:
        bot = Console(settings._replace(workspaces=Path(folder), silence_seconds=min(settings.silence_seconds, 60)), store)
        agent = bot.own.agent
        try:
            info = as_dict(as_dict(agent.ready().agent).get("agentInfo"))
            return (f"{info.get('name', 'the agent')} {info.get('version', '')} made a session; models: "
                    f"{', '.join(agent.model_names()) or 'none reported'}")
        except KiroFailure as failure:
            raise KiroFailure(f"{failure}{agent.advice(failure)}") from failure
        finally:
            bot.shut_down()


def check_locks(settings: Settings) -> str:
    """Name the sessions of this bot that a dead process has locked; the bot removes such a lock when it meets it."""
    stale = []
    if not (settings.folder / DATABASE).exists():
        return "none"
    with open_store(settings) as store:
        for session_id in store.session_ids():
            pid = lock_pid(session_id)
            if pid is not None and not runs_as_kiro(pid, settings):
                stale.append(f"{session_id} (process {pid})")
        fate = "removed at the next message" if store.get_note(LOCKS_BY_PID) else "unless of processes that can't be seen here"
    return f"stale, {fate}: {', '.join(stale)}" if stale else "none stale"


# -- the server's own messages -----------------------------------------------------------------------------------------

def tell(settings: Settings, topic: str, *words: str) -> int:
    """Leave a message in the journal for the bot to find; return 0.  Raises SettingsError, StartError, StoreError."""
    match, path = re.fullmatch(r"(\d{1,18})/(\d{1,18})", topic, re.ASCII), settings.folder / DATABASE
    if not match or int(match[1]) not in settings.allowed or not path.exists():
        raise SettingsError(f"--tell {topic}: run it in the bot's folder, with USER/THREAD of an allowed user (see /status)")
    text = " ".join(words).encode(errors="replace") if words else sys.stdin.buffer.read(TOLD_BYTES + 1)
    if not text.strip() or len(text) > TOLD_BYTES:
        raise SettingsError(f"--tell: the text must have 1 to {TOLD_BYTES} bytes")
    key = int(match[1]), int(match[2])
    with open_store(settings) as store:
        if store.count_told(*key) >= TOLD_AT_MOST:
            raise StartError(f"--tell: {TOLD_AT_MOST} messages wait in {topic} already")
        store.receive_own(*key, own_update(*key, FROM_SERVER + text.decode(errors="replace")), state="told")
    return 0


# -- main --------------------------------------------------------------------------------------------------------------

def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return the exit status: 2 for a bad setting."""
    parser = argparse.ArgumentParser(
        prog="bot.py", description="A Telegram bot that gives every topic of a private chat its own Kiro CLI session. "
                                   "Settings are read from ./.env and the environment (see README.md). "
                                   "Without an option it serves Telegram until SIGINT or SIGTERM.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="try everything once, say what was found, exit 0 or 1")
    modes.add_argument("--console", action="store_true", help="talk to Kiro in this terminal, without Telegram")
    modes.add_argument("--tell", nargs="+", metavar=("USER/THREAD", "TEXT"),
                       help="put TEXT, or what comes on stdin, into a topic as from the server")
    options = parser.parse_args(arguments)
    umask = os.umask(0o077)
    folder = Path.cwd()
    try:
        settings = load_settings(folder, need_token=not (options.console or options.tell))._replace(umask=umask)
        set_up_logging(settings)
        if options.tell:
            return tell(settings, *options.tell)
        warn_of_misspelt(folder / ".env")
        return check(settings) if options.check else console(settings) if options.console else serve(settings)
    except (SettingsError, StartError, StoreError) as error:
        print(f"bot.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


def load_settings(folder: Path, need_token: bool) -> Settings:
    """Read `.env` and the environment, which wins; take the token out of it, so that no child inherits it.

    Raises SettingsError.
    """
    in_file = env_file(folder / ".env")
    settings = read_settings({**in_file, **os.environ}, folder, need_token)
    os.environ.update({name: value for name, value in in_file.items() if name not in os.environ | DEFAULTS})
    os.environ.pop("BOT_TOKEN", None)
    return settings


def env_file(path: Path) -> dict[str, str]:
    """Return what `.env` says, nothing when it is missing.  Raises SettingsError, also where dotenv would only warn."""
    try:
        with open(path, encoding="utf-8") as file:
            for binding in parse_stream(file):
                if binding.error:
                    name = binding.original.string.strip().partition("=")[0]
                    raise SettingsError(f".env, line {binding.original.line}: {name} can't be read (is a quote missing?)")
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error


def warn_of_misspelt(path: Path) -> None:
    """Name what looks like a setting in `.env` and is none."""
    for name in env_file(path).keys() - DEFAULTS:
        for meant in difflib.get_close_matches(name, DEFAULTS, 1, ALIKE):
            log.warning(".env: %s is no setting; is %s meant?", name, meant)


def start(arguments: list[str]) -> None:
    """Run the program and end it."""
    try:
        status = main(arguments)
    except KeyboardInterrupt:    # the check, or the console while it ends
        status = 130
    sys.stdout.flush()
    logging.shutdown()
    os._exit(status)     # not sys.exit: threads that still wait for the network must not keep the program
