"""A Telegram bot that gives every topic of a private chat its own Kiro CLI session.

    python bot.py              serve Telegram until SIGINT or SIGTERM
    python bot.py --check      try everything once, say what was found, exit 0 or 1
    python bot.py --console    talk to Kiro in this terminal, through the same conversation code

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
presses to be answered, while it has.  conversation: one for each conversation that has work or a warm process; it alone calls
Kiro and sends drafts and answers; while a file is downloaded, an aside thread does that for it.  For each Kiro process four
more: reader, writer, stderr, and a waiter, which sees what is left of the process to its end and gives its place back; while
it is ended, an ender, which sends the signals.

Locks, each held for a moment and never across a network call or a turn: `Conversation.lock` (what waits, the turn and its
phase, whether there is a thread), `Questions._lock`, `Places._lock`, `Pace._lock`, `Kiro._lock` (no signal to a pid that is
gone), `Bot._lock` (the table of conversations), `Bot.spawning` (no process starts unseen while the bot closes), and the
database's own.  Read without one, each a single value that is replaced as a whole: `Agent.models` and `Agent.known` (for
/status), `Kiro.turn_open`, `Telegram.rich`, `Draft.stopped`, `Delivery.sending`; and what Kiro has said so far, when the bot stops.

Facts about Kiro and Telegram that the code relies on are marked [acp N] and [tg N]: section N of kiro-acp.md and of
telegram.md, the developers' notes on kiro-cli's ACP mode and on the Bot API, which name their sources.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # CPython keeps the syntax tree of the file that it runs for as long as it runs, 8 MB here; a module's it does not.
    AS_MODULE = "import os, sys; sys.path[0] = os.path.dirname(sys.argv[1]); import bot; bot.start(sys.argv[2:])"
    os.execv(sys.executable, [sys.executable, "-c", AS_MODULE, os.path.realpath(__file__), *sys.argv[1:]])

import argparse
import base64
import bisect
import faulthandler
import fcntl
import hashlib
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
from collections import deque
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import IO, Any, Callable, Iterator, NamedTuple, Optional

import requests
import telebot
import urllib3
from dotenv import load_dotenv
from dotenv.parser import parse_stream
from telebot import apihelper, types, util
from telebot.version import __version__ as telebot_version

from sessions import InboxMessage, SessionRecord, SessionStore, StoreError, UnfinishedTurn

log = logging.getLogger("bot")

DATABASE = "tg-acp.db"


# ======================================================================================================================
# Settings
# ======================================================================================================================

TELEGRAM_API = "https://api.telegram.org"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class SettingsError(Exception):
    """A setting is missing or bad; the text is one line that names it."""


class Settings(NamedTuple):
    """The settings of `.env`, checked."""
    token: str
    allowed: frozenset[int]       # Telegram user ids
    kiro_command: list[str]
    workspaces: Path              # absolute, resolved
    max_processes: int
    warm_seconds: float
    ask_permission: bool
    silence_seconds: float
    rich_messages: bool
    log_level: str
    api_url: str
    folder: Path                  # the bot's own: `.env` and the database are here


def read_settings(env: dict[str, str], folder: Path, need_token: bool = True) -> Settings:
    """Return the settings found in `env`; relative paths are taken from `folder`.  Raises SettingsError."""
    def value(name: str, default: str = "") -> str:
        return env.get(name, "").strip() or default

    return Settings(
        token=_token(value("BOT_TOKEN"), need_token),
        allowed=_user_ids(value("ALLOWED_TELEGRAM_IDS")),
        kiro_command=_command(value("KIRO_COMMAND", "kiro-cli acp --agent-engine v2"), folder),
        workspaces=(folder / Path(value("WORKSPACE_BASE_PATH", "./workspaces/")).expanduser()).resolve(),
        max_processes=int(_number("MAX_PROCESSES", value("MAX_PROCESSES", "3"), at_least=1, whole=True)),
        warm_seconds=_number("WARM_SECONDS", value("WARM_SECONDS", "300"), at_least=0),
        ask_permission=_choice("TOOL_APPROVAL", value("TOOL_APPROVAL", "ask"), ("ask", "allow")) == "ask",
        silence_seconds=_number("SILENCE_SECONDS", value("SILENCE_SECONDS", "600"), at_least=1),
        rich_messages=_choice("RICH_MESSAGES", value("RICH_MESSAGES", "on"), ("on", "off")) == "on",
        log_level=_choice("LOG_LEVEL", value("LOG_LEVEL", "INFO"), LOG_LEVELS),
        api_url=_url("TELEGRAM_API_URL", value("TELEGRAM_API_URL", TELEGRAM_API)),
        folder=folder,
    )


def _token(text: str, needed: bool) -> str:
    if not text and not needed:
        return ""
    if not text:
        raise SettingsError("BOT_TOKEN is missing: get one from @BotFather and put it into .env")
    if not re.fullmatch(r"\d+:[\w-]+", text, re.ASCII):
        raise SettingsError("BOT_TOKEN is not a bot token: it looks like 123456:ABC-DEF, as @BotFather gave it")
    return text


def _user_ids(text: str) -> frozenset[int]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"[1-9]\d{0,18}", name, re.ASCII):
            raise SettingsError(f"ALLOWED_TELEGRAM_IDS: {name!r} is no numeric user id (write to the bot to learn yours)")
    return frozenset(map(int, names))


def _command(text: str, folder: Path) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"KIRO_COMMAND can't be read as a command line: {error}") from error
    if not words:
        raise SettingsError("KIRO_COMMAND is empty")
    return [_absolute(word, folder, is_program=n == 0) for n, word in enumerate(words)]


def _absolute(word: str, folder: Path, is_program: bool) -> str:
    """Return a relative path that exists as absolute, since Kiro runs in another folder; anything else as it is."""
    if word.startswith(("-", "/")) or (is_program and "/" not in word):
        return word
    for base in (folder, Path(__file__).resolve().parent):
        path = str(base / word)
        if os.path.isfile(path) or ("/" in word and os.path.exists(path)):
            return path
    return word


def _number(name: str, text: str, at_least: float, whole: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (at_least <= number < math.inf) or (whole and number != int(number)):
        raise SettingsError(f"{name}: {text!r} is not a {'whole ' if whole else ''}number of at least {at_least:g}")
    return number


def _choice(name: str, text: str, choices: tuple[str, ...]) -> str:
    for choice in choices:
        if text.lower() == choice.lower():
            return choice
    raise SettingsError(f"{name}: {text!r} is none of {', '.join(choices)}")


def _url(name: str, text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise SettingsError(f"{name}: {text!r} is no http or https address")
    return text.rstrip("/")


class Redacted(logging.Formatter):
    """Log lines in which the bot's token can't appear, whatever brought it there [tg 5.6]."""

    def __init__(self, token: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        secret = token.partition(":")[2]
        self._secrets = [token, token.replace(":", "%3A"), *([secret] if len(secret) >= 8 else [])] if token else []

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, "<token>")
        return line


def set_up_logging(settings: Settings) -> None:
    """Log to stderr, ours and every library's, through the one formatter."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacted(settings.token))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    telebot.logger.handlers.clear()
    telebot.logger.setLevel(max(logging.getLevelName(settings.log_level), logging.INFO))   # its DEBUG logs every answer
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)     # it warns of every connection it closes
    threading.excepthook = lambda args: log.critical("A thread ended unexpectedly", exc_info=args[:3])


# ======================================================================================================================
# Poll: updates in, one loop; gate and journal
# ======================================================================================================================

ALLOWED_UPDATES = ["message", "edited_message", "callback_query", "stopped_message_generation"]   # sticky, so always given
POLL_SECONDS = 25               # a long poll; Telegram's cap is 50 [tg 5.1]
CONFLICT_SECONDS = (2, POLL_SECONDS + 10)   # a stray one passes; else longer than a poll: two bots would take turns
CONFLICTS_AT_MOST = 8
STRANGER = "This bot is private. Your Telegram user id is {}; its owner can add it to ALLOWED_TELEGRAM_IDS."
STRANGERS_REMEMBERED = 1000
MESSAGE_KINDS = frozenset(["text", "photo", "document", "audio", "voice", "video", "video_note", "animation", "sticker",
                           "rich_message"])


class Poll:
    """Fetch updates and hand them over.  Its thread waits for Telegram and the database only."""

    def __init__(self, bot: Bot) -> None:
        self._bot = bot
        self._strangers: set[int] = set()
        self._batch: list[Accepted] = []
        self._body = ""                        # the update in hand, as JSON
        self._update_id = 0
        self._told_of_trouble: set[tuple[int, int]] = set()        # (user, thread)
        self._telebot = telebot.TeleBot(bot.settings.token, threaded=False)
        self._register()

    def _register(self) -> None:
        """Register the telebot handlers; without filters, since the gate decides."""
        for add, handler in ((self._telebot.add_message_handler, self._on_message),
                             (self._telebot.add_edited_message_handler, self._on_edit),
                             (self._telebot.add_callback_query_handler, self._on_press),
                             (self._telebot.add_stopped_message_generation_handler, self._on_stop)):
            add({"function": handler, "pass_bot": False, "filters": {}})

    def run(self) -> None:
        """Poll until the bot closes.  The next poll's offset is what tells Telegram that a batch was received [tg 5.5]."""
        offset, failures, conflicts = None, 0, 0
        while not self._bot.closing.is_set():
            try:
                for row in self._bot.store.take_told():        # by bot.py --tell, on this machine
                    self._bot.commands.route(Incoming.from_journal(row))
                updates = self._fetch(offset)
                offset = self._take(updates) or offset
                if failures:
                    log.info("Polling again")
                failures = conflicts = 0
                continue
            except Unauthorized:
                return self._bot.quit(1, "Telegram no longer accepts BOT_TOKEN (401): get the current one from @BotFather")
            except Conflict as error:
                conflicts += 1
                if conflicts > CONFLICTS_AT_MOST:
                    return self._bot.quit(1, f"Giving up: {error}")
                pause = self._resolve(error, conflicts)
            except TooManyRequests as error:
                pause = error.seconds
            except (Unreachable, Refused) as error:
                pause = retry_delay(failures)
                log.log(logging.DEBUG if failures else logging.WARNING, "Telegram can't be polled: %s", error)
                failures += 1
            except StoreError as error:
                pause = retry_delay(failures + 2)
                log.error("Messages can't be journaled and stay with Telegram: %s", error)
                failures += 1
            self._bot.closing.wait(pause)

    def _fetch(self, offset: Optional[int]) -> list[dict]:
        updates = self._bot.telegram.call(apihelper.get_updates, offset=offset, timeout=10,
                                          long_polling_timeout=POLL_SECONDS, allowed_updates=ALLOWED_UPDATES)
        return updates if isinstance(updates, list) else []

    def _resolve(self, conflict: Conflict, times: int) -> float:
        """Return how long to wait after so many 409 in a row: another bot's poll, one of our own that lingers, or a webhook."""
        log.error("%s", conflict)
        pause = CONFLICT_SECONDS[min(times, len(CONFLICT_SECONDS)) - 1]
        if "webhook" not in str(conflict):
            return pause
        log.warning("Removing the webhook that was set for this bot, since it polls")
        try:
            self._bot.telegram.call(apihelper.delete_webhook)
        except TelegramError as error:
            log.error("The webhook can't be removed: %s", error)
            return pause
        return 0

    def _take(self, updates: list[dict]) -> Optional[int]:
        """Journal and hand over a batch; return the offset that acknowledges it.  Raises StoreError: not acknowledged."""
        if not updates:
            return None
        self._batch = []
        for update in updates:
            self._dispatch(update)
        batch, self._batch = self._batch, []
        try:
            new = self._bot.store.receive([a.row for a in batch if a.row and a.kind == "message"],
                                          [a.row for a in batch if a.row and a.kind == "edit"])
        except StoreError as error:
            self._tell_of_trouble(batch, error)
            raise
        finally:
            for accepted in batch:
                if accepted.kind == "press":       # needs no journal, and /stop must work on a full disk too
                    self._hand_over(accepted)
        self._told_of_trouble.clear()
        for accepted in batch:
            if accepted.kind == "edit" or accepted.row and accepted.row.update_id in new:
                self._hand_over(accepted)
        return max(update["update_id"] for update in updates) + 1

    def _dispatch(self, update: dict) -> None:
        """Parse one update and let its handler look at it; whatever is wrong with it stays with it."""
        self._body, self._update_id = json.dumps(update), update["update_id"]
        try:
            self._telebot.process_new_updates([types.Update.de_json(json.dumps(without_novelties(update)))])
        except Exception as error:   # telebot's parsers raise anything [tg 1.3]; a bad update must not stop the others
            log.error("Update %s can't be read and is left out: %r", self._update_id, error)
            self._apologize(update)

    def _apologize(self, update: dict) -> None:
        """Tell an allowed user that a message of theirs was left out, if that much of it can be read."""
        try:
            sender, chat = update["message"]["from"]["id"], update["message"]["chat"]
            if sender in self._bot.settings.allowed and chat["id"] == sender and chat["type"] == "private":
                self._bot.errand((sender, 0), self._bot.conversation(sender, 0).tell,
                                 "I couldn't read one of your messages. Please send it in another way.")
        except (KeyError, TypeError):
            pass

    def _hand_over(self, accepted: Accepted) -> None:
        try:
            accepted.action()
        except Exception:   # a bug in one action must not stop the loop
            log.exception("An update could not be handled")

    def _tell_of_trouble(self, batch: list[Accepted], error: StoreError) -> None:
        """Say it in each topic that wrote, once until the journal can be written again."""
        for user_id, thread_id in {(a.row.user_id, a.row.thread_id) for a in batch if a.row} - self._told_of_trouble:
            self._told_of_trouble.add((user_id, thread_id))
            self._bot.errand((user_id, thread_id), self._bot.conversation(user_id, thread_id).tell,
                             f"⚠️ I can't store messages at the moment ({error}). "
                             "Yours is safe with Telegram; I'll take it as soon as I can.")

    # -- the gate: first of all, who and where -------------------------------------------------------------------------

    def _lets_in(self, sender: Optional[types.User | types.Chat], chat: types.Chat) -> bool:
        """Only allowed users in their own private chat; in a group others would read the answers."""
        return (sender is not None and chat.type == "private" and chat.id == sender.id
                and sender.id in self._bot.settings.allowed)

    def _turn_away(self, message: types.Message) -> None:
        """Tell a stranger their id, once; that is how an owner learns it."""
        stranger = message.from_user.id if message.from_user else None
        if message.chat.type != "private" or stranger is None or stranger in self._strangers:
            return
        if len(self._strangers) >= STRANGERS_REMEMBERED:
            self._strangers.clear()
        self._strangers.add(stranger)
        log.info("A stranger wrote: user %s", stranger)
        self._bot.errand("strangers", self._tell_stranger, stranger, thread_of(message))

    def _tell_stranger(self, stranger: int, thread_id: int) -> None:
        try:
            self._bot.telegram.call(apihelper.send_message, stranger, STRANGER.format(stranger), chat=stranger,
                                    message_thread_id=thread_id or None)
        except (Unreachable, TooManyRequests):
            self._strangers.discard(stranger)      # so that the next message is answered
            raise

    # -- handlers: they look, and say what is to be done once the batch is in the journal ---------------------------------

    def _on_message(self, message: types.Message) -> None:
        if not self._lets_in(message.from_user, message.chat):
            return self._turn_away(message)
        if message.content_type in util.content_type_service:
            return
        incoming = Incoming(self._update_id, message)
        self._batch.append(Accepted("message", lambda: self._bot.commands.route(incoming), self._row(message)))

    def _on_edit(self, message: types.Message) -> None:
        if self._lets_in(message.from_user, message.chat) and message.content_type in MESSAGE_KINDS:
            incoming = Incoming(self._update_id, message)
            row = None if incoming.command in OWN else self._row(message)     # as `Commands.edit` does
            self._batch.append(Accepted("edit", lambda: self._bot.commands.edit(incoming), row))

    def _on_press(self, press: types.CallbackQuery) -> None:
        if press.message and self._lets_in(press.from_user, press.message.chat):
            self._batch.append(Accepted("press", lambda: self._bot.commands.press(press)))

    def _on_stop(self, stop: types.MessageGenerationStopped) -> None:
        if self._lets_in(stop.chat, stop.chat):       # it has no sender: the chat decides [tg 1.3]
            self._batch.append(Accepted("press", lambda: self._bot.commands.stop_draft(stop.chat.id, stop.draft_id)))

    def _row(self, message: types.Message) -> InboxMessage:
        """Return the message's row of the journal.  Raises ValueError for ids that are none."""
        ids = self._update_id, message.chat.id, thread_of(message), message.message_id
        if not all(isinstance(number, int) and abs(number) < 2**63 for number in ids):
            raise ValueError(f"ids {ids}")
        return InboxMessage(*ids, self._body)


def without_novelties(update: dict) -> dict:
    """Return the update with only what telebot knows of a press on Stop: it can't parse another field there [tg 1.3]."""
    stop = update.get("stopped_message_generation")
    if not isinstance(stop, dict):
        return update
    known = {key: stop[key] for key in ("chat", "message_thread_id", "draft_id") if key in stop}
    return {**update, "stopped_message_generation": known}


class Accepted(NamedTuple):
    """An update that the gate let in."""
    kind: str                              # "message", "edit" or "press"
    action: Callable[[], None]             # hands it over; run on the poll thread, so it must not wait
    row: Optional[InboxMessage] = None     # for the journal


class Incoming:
    """A message that a conversation is to handle."""

    def __init__(self, update_id: int, message: types.Message) -> None:
        self.update_id = update_id
        self.message = message
        self.arrived = time.monotonic()
        self.files: Optional[list[Attachment]] = None      # once they are downloaded
        self.command, self.argument = command_of(message)

    @classmethod
    def from_journal(cls, row: InboxMessage) -> Incoming:
        """Return the message of a journal row.  Raises whatever telebot's parsers raise."""
        update = types.Update.de_json(row.body)
        return cls(row.update_id, update.message or update.edited_message)

    @property
    def key(self) -> tuple[int, int]:
        """(user, thread)"""
        return self.message.chat.id, thread_of(self.message)

    @property
    def goes_alone(self) -> bool:
        """Commands are never joined with anything."""
        return bool(self.command)

    @property
    def may_continue(self) -> bool:
        """Is there more to come: an album has no end mark [tg 4], a long pasted text is split by the client."""
        return bool(self.message.media_group_id) or len(self.message.text or "") >= SPLIT_TEXT_LENGTH


def thread_of(message: types.Message) -> int:
    """Return the topic's id, 0 outside; message_thread_id alone also appears on replies [tg 3.2]."""
    return message.message_thread_id or 0 if getattr(message, "is_topic_message", None) else 0


def command_of(message: types.Message) -> tuple[str, str]:
    """Return ("new", "the rest") for "/new the rest", two empty strings for what is no command."""
    text = "" if message.forward_origin else message.text or ""     # what somebody else wrote commands nothing
    match = re.match(r"/([A-Za-z0-9_-]+)(?:@\w+)?(?:\s+(.*))?$", text, re.S)
    return (match[1].lower(), (match[2] or "").strip()) if match else ("", "")


# ======================================================================================================================
# The bot: what all parts share
# ======================================================================================================================

class Closing(Exception):
    """The bot is stopping: leave everything as it is."""


def own_update(user_id: int, thread_id: int, text: str) -> str:
    """Return the JSON of an update with a message that Telegram did not send."""
    chat = {"id": user_id, "type": "private", "first_name": ""}
    return json.dumps({"update_id": -1, "message": {
        "message_id": 0, "date": 0, "chat": chat, "from": {**chat, "is_bot": False}, "text": text,
        "message_thread_id": thread_id or None, "is_topic_message": bool(thread_id)}})


class Bot:
    """Everything with one owner: settings, database, Telegram, places, conversations, living Kiro processes."""

    def __init__(self, settings: Settings, store: SessionStore) -> None:
        self.settings = settings
        self.store = store
        self.closing = threading.Event()       # no new turns, no repeats
        self.exit_status = 0
        self._bell, self.bell_handle = os.pipe()   # main waits for a byte: a lock would not always let a signal through
        self.telegram = Telegram(settings, self.closing)
        self.places = Places(settings.max_processes)
        self.processes: set[Kiro] = set()      # started and not gone; each has a waiter that ends it
        self.spawning = threading.Lock()       # so that none is started unseen while the bot closes
        self.questions = Questions(self.errand)
        self.commands = Commands(self)
        self._conversations: dict[tuple[int, int], Conversation] = {}
        self._lock = threading.Lock()
        self._errands: dict[Any, deque[Callable[[], Any]]] = {}      # by key; those of one key run one after the other

    def chat(self, user_id: int, thread_id: int) -> Topic:
        """Return a way to speak in this topic."""
        return Topic(self.telegram, user_id, thread_id, self.settings.rich_messages)

    def conversation(self, user_id: int, thread_id: int) -> Conversation:
        """Return the conversation of this topic, made when there was none."""
        with self._lock:
            key = user_id, thread_id
            if key not in self._conversations:
                self._conversations[key] = Conversation(self, user_id, thread_id, self.chat(*key))
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
            mine = self._errands.setdefault(key, deque())
            mine.append(lambda: action(*args, **kwargs))
            if len(mine) == 1:
                threading.Thread(target=self._run_errands, args=(key, mine), name="errand", daemon=True).start()

    def _run_errands(self, key: Any, mine: deque[Callable[[], Any]]) -> None:
        while True:
            self._run_errand(mine[0])
            with self._lock:
                mine.popleft()
                if not mine:
                    del self._errands[key]
                    return

    def _run_errand(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Closing:
            pass
        except (TelegramError, StoreError) as error:
            log.warning("Not said: %s", error)
        except Exception:   # a bug; those that wait behind it must be run
            log.exception("An errand failed")

    def say_as(self, user_id: int, thread_id: int, text: str) -> None:
        """Take on a text as if the user had written it in this topic: what a button stands for, in the journal like it.

        Raises StoreError.
        """
        row = self.store.receive_own(user_id, thread_id, own_update(user_id, thread_id, text))
        self.commands.route(Incoming.from_journal(row))

    def quit(self, status: int, reason: str) -> None:
        """End the program with this exit status."""
        log.log(logging.ERROR if status else logging.INFO, "%s", reason)
        self.exit_status = status
        os.write(self.bell_handle, b"!")

    def rings(self, seconds: float) -> bool:
        """Wait until the program should end, at most so long; say whether it should."""
        return bool(select.select([self._bell], [], [], seconds)[0])

    def recover(self) -> None:
        """Take up what a former run left: orphans that hold locks, unfinished turns, and the messages that still wait."""
        self.errand("orphans", self._end_orphans)
        for turn in self.store.unfinished():
            if turn.user_id in self.settings.allowed:
                self.conversation(turn.user_id, turn.thread_id).finish_turn(turn)
        for row in self.store.waiting():
            if row.user_id not in self.settings.allowed:
                continue
            try:
                incoming = Incoming.from_journal(row)
            except Exception as error:   # telebot's parsers raise anything
                log.error("A journaled message can't be read and is left out: %r", error)
                self.store.done(row.update_id)
                continue
            self.commands.route(incoming)

    def _end_orphans(self) -> None:
        for session_id in self.store.session_ids():
            pid = lock_pid(session_id)
            if pid is not None and is_running(pid):
                end_orphan(pid, self.settings)

    def _sending(self) -> bool:
        """Is a part on its way?  A stop between its arrival and its tick would send it twice."""
        return any(conversation.delivery.sending for conversation in self.conversations())

    def shut_down(self) -> None:
        """Within two seconds: cancel and end of stdin for all children, TERM, KILL; keep what was said for the cards."""
        self.closing.set()
        began = time.monotonic()
        if self.spawning.acquire(timeout=0.5):  # whoever was starting a process has listed it, unless the disk hangs
            self.spawning.release()
        for kiro in list(self.processes):
            kiro.cancel()
            kiro.end(patience=None)
        for deadline, signal_number in ((1.0, signal.SIGTERM), (1.5, signal.SIGKILL), (1.8, None)):
            while (self.processes or self._sending()) and time.monotonic() - began < deadline:
                time.sleep(0.01)
            for kiro in list(self.processes) if signal_number else ():
                kiro.signal(signal_number, leftovers=True)
        keeper = threading.Thread(target=self._keep_partials, name="keeper", daemon=True)
        keeper.start()                         # the database may be locked by somebody for longer than we have
        keeper.join(max(0.1, began + 1.9 - time.monotonic()))

    def _keep_partials(self) -> None:
        for conversation in self.conversations():
            conversation.keep_partial()


# ======================================================================================================================
# Commands: what the bot answers itself
# ======================================================================================================================

COMMANDS = {"new": "Start a fresh session in this topic",
            "stop": "Stop what Kiro is doing",
            "model": "Show or choose the model",
            "status": "Session, model, folder, what is running",
            "help": "What this bot can do"}
HELP = """I give every topic of this chat its own Kiro session with its own folder. Just write; Kiro answers.

• While Kiro works you can go on writing: it all goes to Kiro together when the answer is there.
• Photos, files and voice messages are saved in the topic's folder (uploads/), and Kiro is told where.
• Reply to a message, or quote a part of it, and Kiro sees what you mean.
• Kiro can send you files from its folder.

/new – a fresh session in this topic (folder and model stay)
/stop – stop what Kiro is doing; so does the Stop button below a draft
/model – show or choose the model
/status – session, model, folder, what is running
Any other /command goes to Kiro as it is, for example /compact."""
OWN = frozenset(["new", "stop", "model", "status", "start", "help"])      # commands that are not Kiro's
UNSUPPORTED = "I can't pass on this kind of message ({kind}). Send it as text or as a file."
OVER = "This is over."
THIS_RUN = secrets.token_hex(4)     # tells this run's questions from those of former ones


class Commands:
    """Answers commands and presses.  `route`, `edit`, `press` and `stop_draft` are called on the poll thread: they only
    look and hand over; the rest runs as errands."""

    def __init__(self, bot: Bot) -> None:
        self._bot = bot

    def route(self, incoming: Incoming) -> None:
        """Hand a journaled message to whoever answers it."""
        conversation = self._bot.conversation(*incoming.key)
        if incoming.command == "stop":
            stopping = conversation.stop()         # at once: errands of the topic may be waiting
            self._bot.errand(incoming.key, self._stop, incoming, stopping)
        elif incoming.command in ("start", "help"):
            self._bot.errand(incoming.key, self._reply, incoming, HELP)
        elif incoming.command == "status":
            self._bot.errand(incoming.key, self._status, incoming)
        elif incoming.command == "model" and conversation.agent.model_names():
            self._bot.errand(incoming.key, self._model, incoming)
        elif incoming.message.content_type in MESSAGE_KINDS and not is_animated(incoming.message):
            conversation.add(incoming)
        else:
            kind = incoming.message.content_type or "unknown to me"
            self._bot.errand(incoming.key, self._reply, incoming, UNSUPPORTED.format(kind=kind))

    def edit(self, incoming: Incoming) -> None:
        """A message was edited: as long as it waits, it goes as edited."""
        conversation = self._bot.conversation(*incoming.key)
        if incoming.command == "stop":
            conversation.stop()
        if incoming.command in OWN:                # no better version of a message; it stays as it was
            return
        if not conversation.edit(incoming):
            self._bot.errand(incoming.key, conversation.tell,
                             "Your edit came too late: Kiro already has the message as it was. "
                             "Send the correction as a new message.")

    def stop_draft(self, user_id: int, draft_id: int) -> None:
        """The Stop button of a draft; only the running turn's own draft counts."""
        for conversation in self._bot.conversations():
            if conversation.key[0] == user_id:
                conversation.stop(draft_id)

    def press(self, press: types.CallbackQuery) -> None:
        """A button: data that this bot didn't make does nothing."""
        data = press.data or ""
        if match := re.fullmatch(r"ask:([0-9a-f]{16}):(\d{1,2})", data):
            choice = self._decide(press, match[1], int(match[2]))      # at once: Kiro waits
            self._bot.errand(press.id, self._decided, press, match[1], choice)
        elif match := re.fullmatch(r"(again|drop):(\d{1,18})", data):
            self._bot.errand(match[2], self._again if match[1] == "again" else self._drop, press, int(match[2]))
        elif match := re.fullmatch(r"model:(\d{1,18}):([0-9a-f]{16})", data):
            self._bot.errand((press.from_user.id, int(match[1])), self._model_pressed, press, int(match[1]), match[2])

    def _reply(self, incoming: Incoming, text: str, buttons: Optional[Buttons] = None) -> None:
        conversation = self._bot.conversation(*incoming.key)
        try:
            conversation.tell(text, buttons)
        except Refused as error:               # blocked: it would not go better at the next start
            log.warning("Not said: %s", error)
        self._bot.store.done(incoming.update_id)

    def _stop(self, incoming: Incoming, stopping: bool) -> None:
        if stopping:                       # the turn's answer says that it was stopped, when it is true
            return self._bot.store.done(incoming.update_id)
        self._reply(incoming, "Nothing is running in this topic.")

    def _status(self, incoming: Incoming) -> None:
        self._reply(incoming, self._bot.conversation(*incoming.key).status())

    def _model(self, incoming: Incoming) -> None:
        self._reply(incoming, *self._bot.conversation(*incoming.key).agent.answer_model(incoming.argument))

    def _decide(self, press: types.CallbackQuery, token: str, index: int) -> Optional[str]:
        """Pass a decision on; return the option's name, or None when it is over or somebody else's."""
        return self._bot.questions.decide(press.from_user.id, token, index, press.message.message_id)

    def _decided(self, press: types.CallbackQuery, token: str, choice: Optional[str]) -> None:
        self._toast(press, choice or OVER)
        if choice is None and not token.startswith(THIS_RUN):      # else whoever decided it edits the message
            self._settle(press, OVER)

    def _again(self, press: types.CallbackQuery, turn_id: int) -> None:
        rows = self._bot.store.ask_again(turn_id) if self._may_settle(press, turn_id) else []
        for row in rows:
            self.route(Incoming.from_journal(row))
        self._toast(press, "Asking again" if rows else OVER)
        self._settle(press, "Asked again." if rows else OVER)

    def _drop(self, press: types.CallbackQuery, turn_id: int) -> None:
        dropped = self._may_settle(press, turn_id) and self._bot.store.drop(turn_id)
        self._toast(press, "Dropped" if dropped else OVER)
        self._settle(press, "Dropped." if dropped else OVER)

    def _may_settle(self, press: types.CallbackQuery, turn_id: int) -> bool:
        """Is the turn this user's, and does nobody work on it?"""
        rows = self._bot.store.messages_of(turn_id)
        if not rows or rows[0].user_id != press.from_user.id:
            return False
        return not self._bot.conversation(rows[0].user_id, rows[0].thread_id).works_on(turn_id)

    def _model_pressed(self, press: types.CallbackQuery, thread_id: int, key: str) -> None:
        conversation = self._bot.conversation(press.from_user.id, thread_id)
        name = next((name for name in conversation.agent.model_names() if model_key(name) == key), None)
        if name is None:
            return self._toast(press, "This list is out of date. Send /model for a new one.")
        text, _ = conversation.agent.answer_model(name)
        self._toast(press, text)
        self._settle(press, text, keep=False)

    def _toast(self, press: types.CallbackQuery, text: str) -> None:
        """Answer the press, first of all: Telegram lets it expire [tg 3.1]."""
        try:
            self._bot.telegram.call(apihelper.answer_callback_query, press.id, text[:200], chat=press.from_user.id)
        except TelegramError as error:
            log.debug("A press was not answered: %s", error)

    def _settle(self, press: types.CallbackQuery, text: str, keep: bool = True) -> None:
        """Take the buttons off the message that was pressed, and say there what became of it."""
        if not carries(press.message, press.data):
            return
        before = getattr(press.message, "text", None) if keep else None
        self._bot.chat(press.from_user.id, 0).settle(press.message.message_id, f"{before}\n\n{text}" if before else text)


def carries(message: Any, data: Optional[str]) -> bool:
    """Does the message have a button with this data?  Not when somebody made the press up."""
    keyboard = getattr(message, "reply_markup", None)
    return bool(keyboard) and any(button.callback_data == data for row in keyboard.inline_keyboard for button in row)


def is_animated(message: types.Message) -> bool:
    """Is it a sticker that moves, which no model can look at?"""
    sticker = message.sticker
    return bool(sticker and (sticker.is_animated or sticker.is_video))


def model_key(name: str) -> str:
    """Return 16 hex digits for a model's id, which may not fit into a button's 64 bytes [acp 11]."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


# ======================================================================================================================
# Conversation: what waits, what comes next
# ======================================================================================================================

JOIN_SECONDS = 1.0              # how long to wait for the rest of an album or of a pasted text
SPLIT_TEXT_LENGTH = 4000        # clients split a pasted text at 4096
JOURNAL_TRIES = 240
JOURNAL_RETRY_SECONDS = 15
LOOK_SECONDS = 60               # the longest sleep of a conversation's thread
FROZEN_GAP = 5                  # seconds late: this program did not run, and Kiro's silence counts anew
EXCERPT_LENGTH = 300            # characters of what was asked, on a card
SEEN = "👀"


class Conversation:
    """What belongs to one (user, thread): what waits, the turn, the process.

    `add`, `edit`, `stop`, `post` and `status` may be called from any thread and return at once; `tell` waits for Telegram.
    Everything else runs on the conversation's own thread, which exists while there is work or a warm process.
    """

    def __init__(self, bot: Bot, user_id: int, thread_id: int, chat: Topic | Terminal) -> None:
        self.bot, self.store, self.chat = bot, bot.store, chat
        self.key = user_id, thread_id
        self.lock = threading.Lock()            # guards the next five, and the turn's phase
        self.waiting: deque[Incoming] = deque()
        self.unfinished: deque[UnfinishedTurn] = deque()
        self.turn: Optional[Turn] = None        # there is one whenever something waits or runs
        self._running = False                   # is there a thread
        self._burst_seen = False                # the first message that has to wait got its reaction
        self._events: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.agent = Agent(self)
        self.delivery = Delivery(self)
        self._warm_until = 0.0
        self._warming = False                   # nobody asked for what goes on
        self.notes = Notes()

    # -- for all threads -----------------------------------------------------------------------------------------------

    def post(self, *event: Any) -> None:
        """Wake the conversation's thread with an event, which is the name of an `_on_` method and its arguments."""
        self._events.put(event)

    def add(self, incoming: Incoming) -> None:
        """Take on a message."""
        with self.lock:
            self.waiting.append(incoming)
            must_wait = bool(self.unfinished) or self.turn is not None and self.turn.turn_id is not None
            first_to_wait, self._burst_seen = must_wait and not self._burst_seen, must_wait
            self._start()
        self.post("wake")
        if first_to_wait and incoming.message.message_id:
            self.bot.errand(self.key, self.chat.react, incoming.message.message_id, SEEN)

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
            name = "conversation {}/{}".format(*self.key)
            threading.Thread(target=self._run, name=name, daemon=True).start()
            self._running = True

    def edit(self, incoming: Incoming) -> bool:
        """Replace a waiting message by its edited version; return False when Kiro already has it as it was."""
        message = incoming.message
        with self.lock:
            for n, old in enumerate(self.waiting):
                if old.message.message_id == message.message_id:
                    incoming.update_id, incoming.arrived = old.update_id, old.arrived
                    incoming.files = old.files if file_id_of(old.message) == file_id_of(message) else None
                    self.waiting[n] = incoming
                    return True
            for old in self.turn.messages if self.turn else ():
                if old.message.message_id == message.message_id and words(old.message) != words(message):
                    old.message = message              # so that this is told once
                    return False
            return True

    def stop(self, draft_id: Optional[int] = None) -> bool:
        """End the turn; return False when there is none, or not this draft's."""
        with self.lock:
            turn = self.turn
            if turn is None or turn.phase is Phase.OVER or draft_id not in (None, turn.draft.id):
                return False
            if turn.phase is not Phase.STOPPING:
                turn.stop(waiting=len(self.waiting))
            turn.draft.stopped = turn.draft.stopped or draft_id is not None
        self.post("wake")
        return True

    def tell(self, text: str, buttons: Optional[Buttons] = None) -> None:
        """Send a message of the bot's own, and have the draft that it hides sent anew."""
        self.chat.say(text, buttons)
        if self.turn:
            self.post("wake")

    def first_arrival(self) -> float:
        """Return when the message came that is being served."""
        with self.lock:
            messages = (self.turn.messages if self.turn else None) or self.waiting
            return messages[0].arrived if messages else time.monotonic()

    def works_on(self, turn_id: int) -> bool:
        """Is this turn running?"""
        turn = self.turn
        return turn is not None and turn.turn_id == turn_id and turn.phase is not Phase.OVER

    def keep_partial(self) -> None:
        """Keep what Kiro has said in a turn that is being cut off, for the card at the next start."""
        turn = self.turn
        if turn is None or turn.turn_id is None:       # also one that is over: its answer may not be journaled yet
            return
        try:
            self.store.keep_partial(turn.turn_id, turn.answer.text())
        except StoreError as error:
            log.error("A partial answer can't be kept: %s", error)

    def status(self) -> str:
        """Return what /status says."""
        record, known = self.store.get_session(*self.key), self.agent.known
        with self.lock:
            turn, waiting = self.turn, len(self.waiting)
        lines = [f"Session: {record.session_id if record else 'none yet'}",
                 f"Model: {self.agent.model()}",
                 f"Folder: {record.workspace_path if record else self.agent.default_workspace()}"]
        if known.context is not None:
            lines.append(f"Context used: {known.context:.0f} %")
        if known.credits is not None:
            lines.append(f"Last turn: {known.credits:.4g} credits")
        if turn is None:
            lines.append("Nothing is running.")
        elif turn.turn_id is None:
            lines.append(f"Starting: {turn.doing} {waiting} waiting.")
        else:
            lines.append(f"Running for {time.monotonic() - turn.began:.0f} s, {waiting} waiting.")
        return "\n".join(lines)

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
            self._running = bool(self.waiting or self.unfinished or self.agent.kiro or self.agent.former)
            return self._running

    def _step(self) -> None:
        """Do the next piece of work; whatever goes wrong with it must not stop those that follow."""
        turn = None if self.unfinished else self.turn
        try:
            if self.unfinished:
                self._recover()
            elif turn:
                self._serve(turn)
            elif self.agent.kiro:
                self._idle()
            else:
                self.pump(math.inf)            # until the former process has gone, too
        except (NoPlace, Stopped):
            pass
        except Exception as error:   # a bug, or the database: the topic must hear of it, and the next message must work
            if isinstance(error, Closing) or self.bot.closing.is_set():
                raise Closing from error
            log.error("Conversation %s/%s: %s", *self.key, error, exc_info=not isinstance(error, StoreError))
            self.agent.let_go(at_once=True)
            if turn is not None and turn is self.turn:
                self._give_up(turn, error)

    def _give_up(self, turn: Turn, error: Exception) -> None:
        """A turn has failed in an unforeseen way; one that has not begun can wait for the database."""
        if isinstance(error, StoreError) and turn.phase is not Phase.OVER and turn.store_failures < JOURNAL_TRIES:
            return self._await_store(turn, error)
        with self.lock:
            for incoming in turn.messages or self.batch():
                if incoming in self.waiting:
                    self.waiting.remove(incoming)
        self._close(turn)
        self.bot.errand(self.key, self.tell, f"⚠️ Something went wrong here: {error}. "
                        "Your message is kept; I'll come back to it when I'm restarted, or send it again.")

    def _await_store(self, turn: Turn, error: StoreError) -> None:
        """The database can't be used: nothing has begun, the messages wait on, and the next step tries again."""
        with self.lock:
            self.waiting.extendleft(reversed(turn.messages))
            turn.messages = []
        if not turn.store_failures:
            self.bot.errand(self.key, self.tell, f"⚠️ I can't use my database ({error}), so Kiro has to wait. I'll keep trying.")
        turn.store_failures += 1
        self.rest(JOURNAL_RETRY_SECONDS, until_stop=True)

    def _serve(self, turn: Turn) -> None:
        """Do what waits longest."""
        self.agent.take_back()
        with self.lock:
            incoming = self.waiting[0]
            is_job = incoming.command in Job.DOING
            if is_job:
                self.move([incoming], turn)
        if is_job:
            Job(self, turn, incoming).run()
        else:
            self._conclude(turn, turn.run())
        self._close(turn)
        self._warm_up()

    def _close(self, turn: Turn) -> None:
        """The turn is over; whatever waits gets the next one."""
        turn.end()
        with self.lock:
            self.turn = Turn(self) if self.waiting else None

    def _idle(self) -> None:
        """Keep the process ready for a message until it was kept long enough, or its place is needed."""
        kiro = self.agent.offer_place()
        while self.agent.kiro is kiro and self.turn is None and not self.unfinished:
            if kiro.exit_noticed:
                log.info("The warm process of %s/%s has exited (%s)", *self.key, kiro.how_it_ended())
            if kiro.exit_noticed or time.monotonic() >= self._warm_until:
                return self.agent.let_go()
            self.pump(self._warm_until)

    def _warm_up(self) -> None:
        """Start the next process of this thread early, to hide the seconds that start and load take [acp 4.3]."""
        if self.turn:                # it starts what it needs
            return
        if not self.bot.settings.warm_seconds or self.agent.known.refusals:
            return self.agent.let_go()
        self._warm_until = time.monotonic() + self.bot.settings.warm_seconds
        self._warming = True
        try:
            self.agent.ready()
        except KiroFailure as failure:
            log.warning("No warm process for %s/%s: %s", *self.key, failure)
            self.agent.let_go(at_once=True)
        finally:
            self._warming = False

    # -- what waits ----------------------------------------------------------------------------------------------------

    def batch(self) -> list[Incoming]:
        """Return what goes as one prompt: commands alone, everything else up to the next command.  The lock is held."""
        batch: list[Incoming] = []
        for incoming in self.waiting:
            if incoming.goes_alone:
                return batch or [incoming]
            batch.append(incoming)
        return batch

    def move(self, batch: list[Incoming], turn: Turn) -> None:
        """Make the messages that wait longest the turn's.  The lock is held."""
        for _ in batch:
            self.waiting.popleft()
        turn.messages, self._burst_seen = batch, False

    # -- events --------------------------------------------------------------------------------------------------------

    def pump(self, until: float) -> None:
        """Handle what has happened, and send a frame when one is due; return after something happened, or at `until`."""
        if self.bot.closing.is_set():
            raise Closing
        wake_at = min(until, self.turn.refresh() if self.turn else math.inf, time.monotonic() + LOOK_SECONDS)
        try:
            event = self._events.get(timeout=max(wake_at - time.monotonic(), 0))
            while True:
                self._handle(*event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass
        if self.turn and time.monotonic() > wake_at + FROZEN_GAP:
            self.turn.quiet_since = time.monotonic()
        if self.bot.closing.is_set():
            raise Closing

    def wait(self, until: float) -> None:
        """Pump before there is a prompt.  Raises Stopped, also out of a warm start that /new makes pointless."""
        self.pump(until)
        if self.turn:
            self.turn.check_stop()
        with self.lock:
            if self._warming and self.waiting and self.waiting[0].command == "new":
                raise Stopped

    def rest(self, seconds: float, until_stop: bool = False) -> None:
        """Let some time pass."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (until_stop and self.turn and self.turn.phase is Phase.STOPPING):
            self.pump(until)

    def aside(self, work: Callable[[], Any]) -> Any:
        """Do something that waits for the network on a thread of its own, while draft and Stop go on; return its result."""
        outcome: list[tuple[Any, Optional[Exception]]] = []

        def run() -> None:
            try:
                outcome.append((work(), None))
            except Exception as error:   # handed on
                outcome.append((None, error))
            self.post("wake")

        threading.Thread(target=run, name="aside", daemon=True).start()
        while not outcome:
            self.wait(math.inf)
        result, error = outcome[0]
        if error:
            raise error
        return result

    def _handle(self, name: str, *arguments: Any) -> None:
        """Handle one event; a notification in a form that nobody expects ends nothing."""
        try:
            getattr(self, "_on_" + name)(*arguments)
        except Exception:
            if name != "notification":
                raise
            log.exception("A notification of Kiro's can't be understood: %.500s", arguments[1:])

    def _on_wake(self) -> None:
        """Something waits, was stopped, decided, granted or done; the loops see for themselves.  A message hides the draft."""
        if self.turn:
            self.turn.draft.hide()

    def _on_give_way(self, kiro: Kiro) -> None:
        if kiro is self.agent.kiro and kiro.kept_warm:
            log.debug("Giving the warm process of %s/%s up for another topic", *self.key)
            self.agent.let_go()

    def _on_exit(self, kiro: Kiro) -> None:
        kiro.exit_noticed = True
        if kiro in self.agent.former:
            self.agent.former.remove(kiro)

    def _on_response(self, kiro: Kiro, frame: dict) -> None:
        kiro.responses[frame["id"]] = frame

    def _on_permission(self, kiro: Kiro, request_id: Any, params: dict) -> None:
        question = Question(kiro, request_id, params)
        if kiro is not self.agent.kiro or self.turn is None or not self.turn.takes(question):
            question.refuse(for_good=True)

    def _on_notification(self, kiro: Kiro, method: str, params: dict) -> None:
        """Something between a prompt and its response, or an extension of Kiro's at any time."""
        if kiro is self.agent.kiro and self.turn:
            self.turn.hear(method, params)
        self.agent.hear(kiro, method, params)
        self.notes.hear(method, params)


    # -- the end of a turn ---------------------------------------------------------------------------------------------

    def _conclude(self, turn: Turn, outcome: Outcome) -> None:
        """Journal the answer, then send it part by part."""
        turn.end()
        self.agent.known.credits = turn.answer.credits
        self.agent.let_go()                    # a stop may have left it; Telegram may keep us for hours
        parts = turn.answer.parts(outcome, self.notes.take(), [self.agent.nearly_full()])
        try:
            if turn.turn_id is None:
                with self.lock:
                    if not turn.messages:      # else they were taken, and could not be journaled
                        self.move(turn.meant(self.batch()), turn)
                turn.turn_id = self.store.begin(*self.key, [m.update_id for m in turn.messages])
            self.store.answer(turn.turn_id, [json.dumps(part) for part in parts], outcome.offer)
        except StoreError as error:
            log.error("An answer can't be journaled and is sent all the same: %s", error)
        self.delivery.send(turn.turn_id, list(enumerate(parts)), outcome.offer)
        how = outcome.remark.splitlines()[0] if outcome.remark else "done"
        log.info("Turn of %s/%s: %.1f s, %s", *self.key, time.monotonic() - turn.began, how)

    def _recover(self) -> None:
        """Finish a former run's turn: send what is missing, or offer what was cut off; never run it again unasked."""
        with self.lock:
            unfinished = self.unfinished.popleft()
        begun = unfinished.state == "begun"
        try:
            if begun:
                card = [json.dumps(part) for part in self._card(unfinished)]
                self.store.answer(unfinished.turn_id, card, offer=True)
            parts = [(position, json.loads(body)) for position, body in self.store.parts(unfinished.turn_id)]
        except StoreError as error:
            log.error("A former turn has to wait: %s", error)
            with self.lock:
                self.unfinished.appendleft(unfinished)
            return self.rest(JOURNAL_RETRY_SECONDS)
        self.delivery.send(unfinished.turn_id, parts, unfinished.offer or begun, former=not begun)

    def _card(self, unfinished: UnfinishedTurn) -> list[dict]:
        """Return what Kiro had said, and the message that offers the turn again."""
        asked = []
        for row in self.store.messages_of(unfinished.turn_id):
            try:
                message = Incoming.from_journal(row).message
                asked.append(words(message) or f"({message.content_type})")
            except Exception as error:   # telebot's parsers raise anything
                log.error("A journaled message can't be read: %r", error)
        excerpt = shortened(" / ".join(asked), EXCERPT_LENGTH)
        said = [{"kind": "answer", "text": unfinished.partial}] if unfinished.partial else []
        return said + [{**plain_part(f"⚠️ I was interrupted while working on: {excerpt}"), "offer": True}]


class Notes:
    """What is to be said with the topic's next answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._said: set[str] = set()           # texts and subjects of which once is enough

    def add(self, text: str, subject: str = "") -> None:
        """Say this; of a subject only the first, since each new process tells it again."""
        if text in self._texts or subject in self._said:
            return
        self._texts.append(text)
        if subject:
            self._said.add(subject)

    def take(self) -> str:
        """Return what there is to say, and forget it."""
        texts, self._texts = self._texts, []
        return "\n".join(texts)

    def hear(self, method: str, params: dict) -> None:
        """Take in what Kiro tells of its agents and servers [acp 3.8]."""
        name, server, error = method.partition("/")[2], params.get("serverName"), params.get("error")
        if name == "agent/not_found":
            text = f"Kiro has no agent {params.get('requestedAgent')!r} and uses {params.get('fallbackAgent')!r}."
            self.add(text, subject=text)
        elif name == "agent/config_error":
            text = f"Kiro can't read an agent's configuration: {error or json.dumps(params)}"
            self.add(text, subject=text)
        elif name == "mcp/oauth_request":
            self.add(f"The MCP server {server} wants you to sign in: {params.get('oauthUrl')}", subject=f"sign in {server}")
        elif name == "mcp/server_init_failure":
            log.warning("MCP server %s: %s", server, error)
            self.add(f"ℹ️ The MCP server {server} could not be started: {error}", subject=f"failed {server}")
        elif name == "mcp/server_initialized":
            self._said -= {f"sign in {server}", f"failed {server}"}


class Job:
    """What takes its place in the queue and is no prompt: /new, and /model when Kiro has to be asked."""

    def __init__(self, conversation: Conversation, turn: Turn, incoming: Incoming) -> None:
        self._conversation, self._turn, self._incoming = conversation, turn, incoming

    def run(self) -> None:
        """Do it, and say what came of it."""
        conversation, incoming = self._conversation, self._incoming
        text, buttons, done = self._attempt()
        rest = incoming.argument if incoming.command == "new" else ""      # "/new do this": the rest is a message
        if rest and not done:
            text += "\nThe rest of your message was not sent to Kiro."
        self._turn.end()
        if conversation.bot.places.in_demand():    # Telegram may keep us waiting now
            conversation.agent.let_go()
        try:
            conversation.chat.say("\n".join(filter(None, [conversation.notes.take(), text])), buttons)
        except (Refused, Unreachable) as error:    # it is done all the same: /new must not be done again at the next start
            log.error("What became of /%s of %s/%s can't be said: %s", incoming.command, *conversation.key, error)
        if rest and done:
            incoming.command, incoming.message.text = "", rest
            with conversation.lock:
                return conversation.waiting.appendleft(incoming)
        self._journal_done()

    def _attempt(self) -> tuple[str, Optional[Buttons], bool]:
        """Do it; return what to say, with which buttons, and whether it was done."""
        try:
            text, buttons = self.DOING[self._incoming.command](self)
            return text, buttons, self._turn.phase is not Phase.STOPPING
        except Stopped:
            return "⏹ Stopped.", None, False
        except KiroFailure as failure:
            self._conversation.agent.let_go(at_once=True)
            return f"⚠️ {failure}{self._conversation.agent.advice(failure)}", None, False

    def _new(self) -> tuple[str, None]:
        """Make a session now, not with the next message."""
        self._turn.doing = "Starting a new session…"
        kiro = self._conversation.agent.begin_anew()
        return f"✨ A new session has begun. Model: {self._conversation.agent.model()}. Folder: {kiro.workspace}", None

    def _model(self) -> tuple[str, Optional[Buttons]]:
        """Answer /model when Kiro has not told its models yet."""
        self._turn.doing = "Asking Kiro for its models…"
        self._conversation.agent.ready()
        return self._conversation.agent.answer_model(self._incoming.argument)

    def _journal_done(self) -> None:
        """Commit that it is done, or it would be done again at the next start."""
        for _ in range(JOURNAL_TRIES):
            try:
                return self._conversation.store.done(self._incoming.update_id)
            except StoreError as error:
                log.error("The end of /%s can't be journaled: %s", self._incoming.command, error)
            self._conversation.rest(JOURNAL_RETRY_SECONDS)

    DOING = {"new": _new, "model": _model}


# ======================================================================================================================
# Turn: from taking messages to what comes of them
# ======================================================================================================================

KEEP_ALIVE_SECONDS = 20         # a draft lives for 30 seconds [tg 1.1]
DEAF_SECONDS = 20               # for a request to be read from the pipe
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
ANSWER_AT_MOST = 8 * 1024 * 1024         # characters; more is no answer but an accident
TOOLS_KEPT = 100                # calls whose end was not told
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
        self.messages: list[Incoming] = []     # taken, not waiting any more
        self.turn_id: Optional[int] = None     # the journal's, once begun
        self.quiet_since = self.began          # when the clock of silence was set anew; under the questions' lock, too
        self.store_failures = 0                # how often the database failed before it began
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
        return batch[:self._caught] if self._caught else batch

    def end(self) -> None:
        """Kiro is done with it."""
        with self.conversation.lock:
            self.phase = Phase.OVER            # WAITING, ASKED, STOPPING -> OVER
        self._questions.refuse_all(self, "the turn is over")

    def hear(self, method: str, params: dict) -> None:
        """Take in a notification."""
        self.answer.hear(method, params)
        if self.answer.grace is None:
            self._end_by = math.inf
        elif self._end_by == math.inf:
            self._end_by = time.monotonic() + self.answer.grace

    def takes(self, question: Question) -> bool:
        """Ask this question, or allow what it is about; return False when it comes too late or can't be asked."""
        if self.phase is not Phase.ASKED or not question.options:
            return False
        self.answer.heard = True
        if not self._settings.ask_permission:
            question.answer(question.option_of_kind("allow_once", "allow_always"))
            return True
        question.put(self, self.answer.describe(question.tool_call))
        self._questions.add(question)
        return True

    # -- what is shown -------------------------------------------------------------------------------------------------

    def refresh(self) -> float:
        """Send the next frame if it is due; return when to look again."""
        if self.phase is Phase.OVER:
            return math.inf
        return self.draft.refresh(self.answer, self.status())

    def status(self) -> str:
        """Return the draft's last line: what Kiro does, or what it waits for."""
        if self.phase is Phase.STOPPING:
            return "⏹ Stopping…"
        if self._questions.of(self):
            return "❓ Waiting for your decision"
        if self.answer.running:
            return f"🔧 {self.answer.running}"
        return self.answer.trouble or ("" if self.answer.length else self.doing)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Bring the waiting messages to Kiro and hear it out.  Raises Closing, and StoreError when it has not begun."""
        try:
            return self._ask_or_again()
        except Stopped:
            if self.turn_id is not None:
                return Outcome("⏹ Stopped.", stopped=True)
            return Outcome("⏹ Stopped before Kiro began.", offer=True, stopped=True)
        except KiroFailure as failure:
            if self.phase is Phase.STOPPING:
                return Outcome("⏹ Stopped.", stopped=True)
            return Outcome(f"⚠️ {failure}{self._agent.advice(failure)}", offer=True)
        except Closing:
            raise
        except Exception as error:   # a bug: it must not cost what Kiro has said, nor the message
            if self.conversation.bot.closing.is_set():
                raise Closing from error
            if isinstance(error, StoreError) and self.turn_id is None:
                raise
            log.error("A turn of %s/%s: %r", *self.conversation.key, error, exc_info=not isinstance(error, StoreError))
            self._agent.let_go(at_once=True)
            return Outcome(f"⚠️ Something went wrong here: {error}.", offer=True)

    def _ask_or_again(self) -> Outcome:
        """Ask Kiro; a process that fails before it said anything is replaced once."""
        warm = self._agent.kiro
        try:
            return self._ask()
        except KiroFailure as failure:
            used = self._agent.kiro
            self._agent.let_go(at_once=not isinstance(failure, KiroRefusal))
            outlived_login = used is warm and isinstance(failure, KiroRefusal) and NOT_LOGGED_IN.search(str(failure))
            if not (failure.again or outlived_login) or self.answer.heard or self.phase is Phase.STOPPING:
                raise
            log.warning("Once more for %s/%s: %s", *self.conversation.key, failure)
        with self.conversation.lock:
            self.check_stop()
            self.phase = Phase.WAITING         # ASKED -> WAITING
        return self._ask()

    def _ask(self) -> Outcome:
        """Get a process, send the prompt, listen."""
        kiro = self._agent.ready()
        if self.turn_id is None:
            self._wait_for_rest()
            self._take(kiro)
            self._begin()
        lesson = self._agent.lesson(wanted=not self.messages[0].command)
        with self.conversation.lock:
            self.check_stop()                  # the last moment at which Kiro need not hear of it
            self.phase = Phase.ASKED           # WAITING -> ASKED
        request_id, self.quiet_since = kiro.prompt(self._prompt + lesson)
        return self._listen(kiro, request_id)

    def _wait_for_rest(self) -> None:
        """Wait a moment for the rest of an album or of a split text."""
        while True:
            with self.conversation.lock:
                last = self.conversation.batch()[-1]
            until = last.arrived + JOIN_SECONDS
            if not last.may_continue or time.monotonic() >= until:
                return
            self.conversation.wait(until)

    def _take(self, kiro: Kiro) -> None:
        """Turn waiting messages into the prompt."""
        conversation = self.conversation
        while True:
            with conversation.lock:
                batch = conversation.batch()
            self._prompt = self._compose(kiro, batch)
            with conversation.lock:
                self.check_stop()
                if all(old is now for old, now in zip(batch, conversation.waiting)):     # else one was edited meanwhile
                    return conversation.move(batch, self)

    def _begin(self) -> None:
        """Commit that the turn begins.  While the disk is full nothing is begun: what can't be noted could run twice."""
        conversation, told = self.conversation, False
        for _ in range(JOURNAL_TRIES):
            try:
                self.turn_id = conversation.store.begin(*conversation.key, [m.update_id for m in self.messages])
                return None if self.messages[0].command else conversation.delivery.unsent.clear()      # Kiro hears of them now
            except StoreError as error:
                log.error("A turn can't be journaled: %s", error)
                if not told:
                    told = True
                    conversation.bot.errand(conversation.key, conversation.tell, f"⚠️ I can't write my journal ({error}), "
                                            "so Kiro has to wait. I'll keep trying.")
            conversation.rest(JOURNAL_RETRY_SECONDS, until_stop=True)
            self.check_stop()
        raise KiroFailure("My journal can't be written. Ask whoever runs this bot to look at its disk.")

    def _compose(self, kiro: Kiro, batch: list[Incoming]) -> list[dict]:
        """Return the messages as ACP content blocks; their files are downloaded first."""
        if batch[0].command:
            return [{"type": "text", "text": re.sub(r"^(/[\w-]+)@\w+", r"\1", words(batch[0].message))}]
        for incoming in batch:
            if incoming.files is None:
                incoming.files = self._download(kiro, incoming)
        text = join_texts(batch)
        if text.startswith("/"):               # a caption for one: no command, but Kiro would take it for one
            text = f"[Message:]\n{text}"
        blocks = [{"type": "text", "text": text}]
        if unsent := self.conversation.delivery.unsent:
            blocks.append({"type": "text", "text": f"[From the bot: not sent to the user: {'; '.join(unsent)}]"})
        return blocks + (image_blocks(batch) if kiro.takes_images else [])

    def _download(self, kiro: Kiro, incoming: Incoming) -> list[Attachment]:
        """Fetch a message's file into the workspace; one that can't be had is named."""
        file = file_of(incoming.message)
        if file is None:
            return []
        try:
            chunks = self._attended(self.conversation.chat.download(file))
            path = self.conversation.aside(lambda: save(chunks, kiro.workspace, file.name))
        except (TelegramError, OSError) as error:
            reason = getattr(error, "description", None) or getattr(error, "strerror", None) or str(error)
            log.warning("A file of %s/%s could not be had: %s", *self.conversation.key, reason)
            self.conversation.notes.add(f"⚠️ I could not get {harmless_name(file.name)}: {reason}")
            return [Attachment("", f"{harmless_name(file.name)}: {reason}", False)]
        return [Attachment(path, "", file.is_image)]

    def _attended(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass a download on until the turn is stopped or the time is up.  Runs aside."""
        limit = time.monotonic() + DOWNLOAD_SECONDS
        for chunk in chunks:
            if self.phase is not Phase.WAITING or self.conversation.bot.closing.is_set():
                raise Unreachable("it was stopped")
            if time.monotonic() > limit:
                raise Unreachable(f"the download took more than {DOWNLOAD_SECONDS // 60} minutes")
            yield chunk

    def _listen(self, kiro: Kiro, request_id: int) -> Outcome:
        """Hear Kiro out.  The response ends the turn [acp 3.4]."""
        asked_at, self._end_by = self.quiet_since, math.inf
        glance = min(DEAF_SECONDS, self._settings.silence_seconds) / 4
        while request_id not in kiro.responses:
            now = time.monotonic()
            if now >= self._end_by or kiro.exit_noticed and self._end_by < math.inf:
                log.info("No response after the end of a turn of %s/%s", *self.conversation.key)
                return self._ended(kiro, {})
            self._agent.check_alive(kiro, asked_at)
            self.conversation.pump(min(self._obey_stop(kiro, now), self._watch_silence(kiro, now), self._end_by,
                                        self._tend_questions(now), now + glance))
        frame = kiro.responses.pop(request_id)
        if "error" not in frame:
            return self._ended(kiro, frame["result"] if isinstance(frame.get("result"), dict) else {})
        self.check_stop()
        raise KiroRefusal(frame["error"])

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

    def _obey_stop(self, kiro: Kiro, now: float) -> float:
        """Pass a stop on to Kiro, and end a Kiro that does not obey; return when to look again."""
        if self.phase is not Phase.STOPPING:
            return math.inf
        if self._cancelled_at is None:
            self._cancelled_at = now
            self._questions.refuse_all(self, "stopped")
            kiro.cancel()
        if now >= self._cancelled_at + STOP_SECONDS:
            self._agent.let_go(at_once=True)
            raise Stopped
        return self._cancelled_at + STOP_SECONDS

    def _tend_questions(self, now: float) -> float:
        """Ask what has not been asked, refuse what was not answered in time; return when to look again."""
        in_demand = self.conversation.bot.places.in_demand()
        return self._questions.tend(self, now, PERMISSION_SECONDS_IN_DEMAND if in_demand else PERMISSION_SECONDS)

    def _watch_silence(self, kiro: Kiro, now: float) -> float:
        """End a Kiro that says nothing for too long; return when to look again."""
        if self._questions.of(self) or self._end_by < math.inf:
            return math.inf
        patience = self._settings.silence_seconds * (TOOL_PATIENCE if self.answer.running else 1)
        limit = max(kiro.heard_at, self.quiet_since) + patience
        if now >= limit:
            raise KiroFailure(f"Kiro said nothing for {patience:.0f} s, so I ended it.")
        return limit


class Question:
    """A tool call that Kiro asks about."""

    def __init__(self, kiro: Kiro, request_id: Any, params: dict) -> None:
        self.token = THIS_RUN + secrets.token_hex(4)
        self._kiro, self._request_id = kiro, request_id        # Kiro's, echoed as it came
        options, tool_call = params.get("options"), params.get("toolCall")
        self.options = [o for o in options if isinstance(o, dict) and "optionId" in o] if isinstance(options, list) else []
        self.tool_call = tool_call if isinstance(tool_call, dict) else {}
        self.turn: Optional[Turn] = None       # whose it is, once it is put
        self.text = ""
        self.message_id: Optional[int] = None  # once it is in the topic
        self.asked_at = self.try_at = time.monotonic()     # when Kiro asked; when to try to ask the user (again)

    def put(self, turn: Turn, text: str) -> None:
        """It is to be asked in this turn's topic."""
        self.turn, self.text = turn, text

    def option_of_kind(self, *kinds: str) -> Optional[str]:
        """Return the id of the first option of these kinds; ids differ between versions [acp 3.6]."""
        return next((option["optionId"] for kind in kinds for option in self.options if option.get("kind") == kind), None)

    def answer(self, option_id: Optional[str]) -> None:
        """Answer Kiro; None cancels."""
        outcome = {"outcome": "cancelled"} if option_id is None else {"outcome": "selected", "optionId": option_id}
        self._kiro.respond(self._request_id, {"outcome": outcome})

    def refuse(self, for_good: bool) -> None:
        """Refuse: this call only, or `for_good` as at the end of the turn, which some agents take a cancel for."""
        self.answer(None if for_good else self.option_of_kind("reject_once", "reject_always"))


class Questions:
    """The open questions of all turns.  Whoever takes one out of here answers it.

    `decide` runs on the poll thread, everything else on the thread of the question's conversation.
    """

    def __init__(self, errand: Callable[..., None]) -> None:
        self._errand = errand
        self._open: dict[str, Question] = {}
        self._lock = threading.Lock()

    def add(self, question: Question) -> None:
        """Take in a question that is to be asked."""
        with self._lock:
            self._open[question.token] = question

    def of(self, turn: Turn) -> list[Question]:
        """Return a turn's open questions."""
        with self._lock:
            return [question for question in self._open.values() if question.turn is turn]

    def _take(self, question: Question) -> bool:
        """Close a question; the clock of silence starts anew.  False: somebody else did."""
        with self._lock:
            question.turn.quiet_since = time.monotonic()
            return self._open.pop(question.token, None) is not None

    def decide(self, user_id: int, token: str, index: int, message_id: int) -> Optional[str]:
        """Answer a question; return the option's name, or None when it is over or somebody else's."""
        with self._lock:
            question = self._open.get(token)
        conversation = question.turn.conversation if question else None
        if conversation is None or conversation.key[0] != user_id or index >= len(question.options):
            return None
        if question.turn.phase is Phase.STOPPING or not self._take(question):
            return None
        option = question.options[index]
        question.answer(option["optionId"])
        choice = whole_characters(f"→ {option.get('name') or option['optionId']}")
        self._settle(question, choice, message_id)
        conversation.post("wake")
        return choice

    def tend(self, turn: Turn, now: float, patience: float) -> float:
        """Ask what has not been asked, refuse what was not answered in time; return when to look again."""
        look_again = math.inf
        for question in self.of(turn):
            if now >= question.asked_at + patience:
                self._refuse(question, f"nobody answered for {patience // 60:.0f} minutes", for_good=False)
            elif question.message_id is None and now >= question.try_at:
                self._ask(question)
                turn.draft.hide()
            due = question.asked_at + patience if question.message_id else question.try_at
            look_again = min(look_again, due, now + DEAF_SECONDS)
        return look_again

    def _ask(self, question: Question) -> None:
        """Put the question into the topic; when Telegram can't be reached, note when to try again."""
        buttons = [[(str(option.get("name") or option["optionId"]), f"ask:{question.token}:{n}")]
                   for n, option in enumerate(question.options)]
        try:
            question.message_id = question.turn.conversation.chat.ask(question.text, buttons)
        except (Unreachable, TooManyRequests) as error:
            question.try_at = time.monotonic() + getattr(error, "seconds", ASK_RETRY_SECONDS)
        except Refused as error:
            log.error("A permission could not be asked for: %s", error)
            self._refuse(question, "it could not be asked", for_good=False)

    def _refuse(self, question: Question, why: str, for_good: bool) -> None:
        if self._take(question):
            question.refuse(for_good)
            self._settle(question, f"→ Refused: {why}.", question.message_id)

    def refuse_all(self, turn: Turn, why: str) -> None:
        """Refuse whatever a turn asks that is over, or being stopped."""
        for question in self.of(turn):
            self._refuse(question, why, for_good=True)

    def _settle(self, question: Question, outcome: str, message_id: Optional[int]) -> None:
        """Say in the question's message what became of it."""
        conversation = question.turn.conversation
        if message_id is not None:
            self._errand(conversation.key, conversation.chat.settle, message_id, f"{question.text}\n\n{outcome}")


# ======================================================================================================================
# Prompt: what a message says to Kiro
# ======================================================================================================================

LESSON = """[About this chat, from the bot that brings you these messages: the user reads your answers in Telegram on a \
phone, as Markdown. To send a file from the working directory, write <send_file path="relative/path">caption</send_file> in \
the answer itself, outside of any code; the tag is not shown. What you leave running in the background ends with your answer.]"""
UPLOADS = "uploads"
IMAGE_BYTES = 3_700_000         # of one image block [acp 7]
IMAGES_BYTES = 12_000_000       # base64 of all image blocks of a prompt
IMAGES_AT_MOST = 10             # of a prompt [acp 7]
IMAGE_EDGE = 2000               # pixels; larger images can poison a session [acp 4.6]
NAME_LENGTH = 100               # bytes of a saved file's name
DOWNLOAD_SECONDS = 15 * 60
DOWNLOAD_CHUNK = 64 * 1024
DOWNLOAD_LIMIT = 20 * 1024 * 1024       # of the official Bot API server [tg 4]
DEFAULT_TYPES = {"voice": "audio/ogg", "video": "video/mp4", "video_note": "video/mp4", "audio": "audio/mpeg"}


class Attachment(NamedTuple):
    """A file that came with a message."""
    path: str                   # absolute, in the workspace; empty when it could not be had
    trouble: str                # why not
    is_image: bool              # small enough to be shown to the model


def words(message: types.Message) -> str:
    """Return what the person wrote: text, caption, or the text of a rich message [tg 2.1]."""
    if message.content_type == "rich_message":
        return "\n".join(_texts_in(message.json.get("rich_message")))
    return message.text or message.caption or ""


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the text of each block."""
    if isinstance(value, dict):
        if "text" in value:
            yield _rich_text(value["text"])
        for key, inner in value.items():
            if key != "text":
                yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)


def _rich_text(value: Any) -> str:
    """Return a RichText, which is a string, a list of such, or an object around one, without its formatting."""
    if isinstance(value, list):
        return "".join(map(_rich_text, value))
    return _rich_text(value.get("text", "")) if isinstance(value, dict) else str(value)


def quoted(message: types.Message) -> str:
    """Return the text that the message replies to, as a Markdown quote, or nothing.

    A topic's first message is no quote: clients put it there by themselves [tg 3.2].
    """
    reply = message.reply_to_message
    if reply is not None and reply.message_id == message.message_thread_id:
        return ""
    text = message.quote.text if message.quote else (words(reply) or f"({reply.content_type})") if reply else ""
    if not text:
        return ""
    return "\n".join(f"> {line}" for line in text.splitlines()) + "\n\n"


def origin(message: types.Message) -> str:
    """Return a line that says where a forward comes from, or nothing."""
    source = message.forward_origin
    if source is None:
        return ""
    user = getattr(source, "sender_user", None)
    chat = getattr(source, "sender_chat", None) or getattr(source, "chat", None)
    name = user.full_name if user else chat.title if chat else getattr(source, "sender_user_name", None)
    return f"[Forwarded from {name or 'somebody'}]\n"


def text_block(incoming: Incoming) -> str:
    """Return everything that one message says, files included."""
    message = incoming.message
    lines = [quoted(message) + origin(message) + words(message)]
    if message.sticker:
        lines.append(f"[Sticker {message.sticker.emoji or ''}]")
    for attachment in incoming.files or ():
        lines.append(f"[File: {attachment.path}]" if attachment.path else f"[A file could not be had: {attachment.trouble}]")
    return "\n".join(line for line in lines if line)


def join_texts(batch: list[Incoming]) -> str:
    """Join messages to one text; a pasted text that the client split is put together again."""
    text, last = "", None
    for incoming in batch:
        split = last is not None and len(last.message.text or "") >= SPLIT_TEXT_LENGTH and not incoming.message.forward_origin
        separator = "\n" if split else "\n\n" if text else ""
        block = text_block(incoming)
        text, last = text + separator * bool(block) + block, incoming
    return text


def image_blocks(batch: list[Incoming]) -> list[dict]:
    """Return the images as ACP blocks, as far as they fit into one prompt."""
    blocks, room = [], IMAGES_BYTES
    for path in (a.path for incoming in batch for a in incoming.files or () if a.is_image and a.path):
        with open(path, "rb") as file:
            data = file.read(IMAGE_BYTES + 1)
        mime_type = image_type(data)
        encoded = base64.b64encode(data).decode()
        if mime_type and len(data) <= IMAGE_BYTES and len(encoded) <= room and len(blocks) < IMAGES_AT_MOST:
            room -= len(encoded)
            blocks.append({"type": "image", "mimeType": mime_type, "data": encoded})
    return blocks


def image_type(data: bytes) -> str:
    """Return the MIME type of an image by its first bytes, or nothing."""
    for start, mime_type in ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif")):
        if data.startswith(start):
            return mime_type
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


class TelegramFile(NamedTuple):
    """A file of a message: what Telegram tells of it."""
    file_id: str
    size: int                   # bytes; 0 when Telegram does not say
    name: str                   # the sender's, or one of ours
    is_image: bool


def file_of(message: types.Message) -> Optional[TelegramFile]:
    """Return the message's file, or None; of a photo the largest size that is not too large [acp 7]."""
    kind = message.content_type
    if kind == "photo":
        fitting = [p for p in message.photo if max(p.width, p.height) <= IMAGE_EDGE] or message.photo[:1]
        media = max(fitting, key=lambda p: p.width * p.height)
        return TelegramFile(media.file_id, media.file_size or 0, f"photo_{message.message_id}.jpg", True)
    if kind == "sticker":
        return TelegramFile(message.sticker.file_id, message.sticker.file_size or 0, f"sticker_{message.message_id}.webp", True)
    if kind not in ("document", "audio", "voice", "video", "video_note", "animation"):
        return None
    media = getattr(message, kind)
    extension = mimetypes.guess_extension(getattr(media, "mime_type", None) or DEFAULT_TYPES.get(kind, "")) or ""
    name = getattr(media, "file_name", None) or f"{kind}_{message.message_id}{extension}"
    return TelegramFile(media.file_id, media.file_size or 0, name, False)


def file_id_of(message: types.Message) -> str:
    """Return the file_id of the message's file, or nothing."""
    file = file_of(message)
    return file.file_id if file else ""


def harmless_name(name: str) -> str:
    """Return a file name without path, control and direction-changing characters, never hidden, of bounded length."""
    name = "".join("_" if c in '/\\:*?"<>|;' or unicodedata.category(c)[0] in "CZ" and c != " " else c for c in name)
    name = name.lstrip(" .-").rstrip(" .") or "file"
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension.encode()) > 16:
        stem, extension = name, ""
    keep = NAME_LENGTH - len(extension.encode()) - 1
    stem = stem.encode()[:keep].decode(errors="ignore").rstrip(" .") or "file"
    return f"{stem}.{extension}" if extension else stem


def free_path(folder: str, name: str) -> str:
    """Return a path in the folder that nothing has yet."""
    stem, extension = os.path.splitext(name)
    path, n = os.path.join(folder, name), 1
    while os.path.lexists(path):
        n += 1
        path = os.path.join(folder, f"{stem}-{n}{extension}")
    return path


def uploads_folder(workspace: str) -> str:
    """Return the folder for files that come in, made when it is missing.  Raises OSError, also when it leads elsewhere."""
    folder = os.path.join(workspace, UPLOADS)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.realpath(folder) != os.path.join(os.path.realpath(workspace), UPLOADS):
        raise OSError(0, f"{UPLOADS}/ is a link to another place")
    return folder


def save(chunks: Iterator[bytes], workspace: str, name: str) -> str:
    """Stream a file into the uploads under a temporary name, then give it its own; return the path.  Raises OSError."""
    folder = uploads_folder(workspace)
    for left in Path(folder).glob(".incoming-*"):      # of a run that was killed; there is one download at a time
        left.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".incoming-", dir=folder)
    try:
        with open(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
        path = free_path(folder, harmless_name(name))
        os.rename(temporary, path)
        return path
    except BaseException:
        os.unlink(temporary)
        raise


# ======================================================================================================================
# Agent: a topic's hold on Kiro
# ======================================================================================================================

INITIALIZE_SECONDS = 30         # how long Kiro may take [acp 10], each but for silence: SILENCE_SECONDS if that is less
SESSION_SECONDS = 90
MISSING_SECONDS = 10            # for the load of a session whose file is missing or empty; some versions never answer that
MODEL_SECONDS = 5
LOCK_SECONDS = 15
REQUEST_PATIENCE = 4            # times its seconds, for a request during which Kiro keeps talking
REPLAY_SECONDS = 1.0            # for what some agents replay after their response to session/load
QUIET_SECONDS = 0.03            # a replay is over when nothing came for this long
FULL_CONTEXT = 80               # percent
SAME_REFUSALS = 2               # so many turns refused in the same words are the session's fault
HISTORY_GONE = ("⚠️ Kiro no longer has this topic's session: its history is gone, a new one has begun. "
                "The folder is as it was.")
NOTHING_KEPT = "ℹ️ Kiro kept nothing of what was said here before, so it starts afresh."


class KiroFailure(Exception):
    """Kiro could not do it; the text is for the user.  `again`: worth one more try with a fresh process."""

    def __init__(self, text: str, again: bool = False) -> None:
        super().__init__(text)
        self.again = again


class KiroRefusal(KiroFailure):
    """A JSON-RPC error; Kiro itself is well."""

    def __init__(self, error: Any) -> None:
        self.code = error.get("code") if isinstance(error, dict) else None
        super().__init__(error_text(error))


class KiroGone(KiroFailure):
    """The process has exited, or has to."""


class KiroSilent(KiroFailure):
    """A request was not answered in time."""


class KiroLocked(KiroFailure):
    """Somebody else has the session."""


class SessionLost(Exception):
    """Kiro does not have the thread's session any more."""


class NoPlace(Exception):
    """No process may be started or kept for this conversation now."""


class Places:
    """The right to have a Kiro process, MAX_PROCESSES times; first come, first served.

    Warm processes give way: whenever somebody queues, the one unused longest is asked to.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = count
        self._queue: list[Ticket] = []                  # in order of arrival
        self._warm: dict[Conversation, Kiro] = {}       # in order of last use
        self._lock = threading.Lock()

    def ask(self, conversation: Conversation) -> Ticket:
        """Return a ticket, granted at once or when its turn comes; the conversation is then woken."""
        with self._lock:
            ticket = Ticket(conversation)
            if self._free and not self._queue:
                self._free -= 1
                ticket.granted = True
            else:
                self._queue.append(ticket)
                self._queue.sort(key=lambda waiting: waiting.arrived)      # threads may get here in another order
                self._ask_a_warm_one()
            return ticket

    def try_take(self) -> bool:
        """Take a place that nobody wants; False when there is none."""
        with self._lock:
            if not self._free or self._queue:
                return False
            self._free -= 1
            return True

    def withdraw(self, ticket: Ticket) -> None:
        """Leave the queue; a place that was granted meanwhile goes to the next."""
        with self._lock:
            if ticket in self._queue:
                self._queue.remove(ticket)
                return
        self.give_back()

    def give_back(self) -> None:
        """A process has gone: its place goes to whoever waits longest."""
        with self._lock:
            if not self._queue:
                self._free += 1
                return
            ticket = self._queue.pop(0)
            ticket.granted = True
        ticket.conversation.post("wake")

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
        with self._lock:
            return bool(self._queue)

    def _ask_a_warm_one(self) -> None:
        if self._warm:
            conversation = next(iter(self._warm))
            conversation.post("give_way", self._warm.pop(conversation))


class Ticket:
    """A conversation's wait for a place."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.arrived = conversation.first_arrival()
        self.granted = False


class Known:
    """What Kiro and its answers have told of the present session."""

    def __init__(self) -> None:
        self.context: Optional[float] = None   # percent used
        self.credits: Optional[float] = None   # of the last turn
        self.full_told = False                 # that the context is nearly used up
        self.refusals: list[str] = []          # the last turns' errors, while they are the same


class Agent:
    """A topic's hold on Kiro: the process for this or the next turn, with the topic's session and model, and those that are
    still ending.

    On its conversation's thread only.  Of the conversation it uses `wait`, `post`, `notes`, `turn` and `first_arrival`.
    While it waits, events are handled, and one of them may take a warm process away: `check_alive` finds that out.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._bot, self._key = conversation, conversation.bot, conversation.key
        self._settings, self._store, self._places = self._bot.settings, self._bot.store, self._bot.places
        self.kiro: Optional[Kiro] = None
        self.former: list[Kiro] = []            # they may still hold the session's lock
        self.models: Optional[Models] = None    # what Kiro told last; replaced as a whole, so any thread may read it
        self.known = Known()
        self._lost = ""                         # a session that Kiro does not have any more
        self._no_load_told = False

    # -- the process ---------------------------------------------------------------------------------------------------

    def ready(self) -> Kiro:
        """Return a process with the thread's session loaded and its model set; each step is done once.

        Raises KiroFailure, Stopped, Closing, and NoPlace when there is no turn that could wait for a place.
        """
        if self._conversation.turn:
            self._conversation.turn.check_stop()
        while True:
            kiro = self.kiro
            if kiro is None or kiro.gone.is_set():
                self.let_go()                 # a dead one is replaced, unnoticed
                kiro = self._start()
            try:
                self._initialize(kiro)
                if not kiro.session_id:
                    self._open_session(kiro)
                self._apply_model(kiro)
                return kiro
            except SessionLost:
                self.let_go(at_once=True)

    def begin_anew(self) -> Kiro:
        """Return another process with another session, which is the thread's from now on.  Raises as `ready`."""
        self.let_go()
        kiro = self._start()
        self._initialize(kiro)
        self._new_session(kiro)
        try:
            self._apply_model(kiro)
        except Stopped:                   # too late: the session is the thread's
            pass
        return kiro

    def _initialize(self, kiro: Kiro) -> None:
        if kiro.agent is None:
            kiro.agent = self.request(kiro, "initialize", INITIALIZE, INITIALIZE_SECONDS)

    def _start(self) -> Kiro:
        """Start a process as soon as there is a place for it.  Raises KiroFailure, Stopped, Closing, NoPlace."""
        workspace = self.workspace()
        self._take_place()
        try:
            kiro = self.kiro = Kiro(self._bot, workspace, self._conversation.post)
        except (OSError, ValueError) as error:
            self._places.give_back()
            reason = getattr(error, "strerror", None) or error
            raise KiroFailure(f"Kiro could not be started: {reason} ({self._settings.kiro_command[0]}). Check KIRO_COMMAND on "
                              "the server.") from error
        if self._conversation.turn is None:
            self.offer_place()
        return kiro

    def _take_place(self) -> None:
        """Get the right to start a process.  Without a turn, only a place that nobody wants will do."""
        if self._conversation.turn is None and self._places.try_take():
            return
        if self._conversation.turn is None:
            self._await_former()        # which may free its place
        if self._conversation.turn is None:
            if self._places.try_take():
                return
            raise NoPlace
        ticket, turn = self._places.ask(self._conversation), self._conversation.turn
        doing, turn.doing = turn.doing, "Waiting for a free place…"
        try:
            while not ticket.granted:
                self._conversation.wait(math.inf)
        except BaseException:
            self._places.withdraw(ticket)
            raise
        turn.doing = doing

    def offer_place(self) -> Kiro:
        """The process is not in use, and may be asked to give way; return it."""
        self.kiro.kept_warm = True
        self._places.keep_warm(self._conversation, self.kiro)
        return self.kiro

    def take_back(self) -> None:
        """Use the warm process again, unless it has been asked to give way."""
        if self.kiro and self.kiro.kept_warm and not self._places.claim(self._conversation):
            self.let_go()
        elif self.kiro:
            self.kiro.kept_warm = False

    def let_go(self, at_once: bool = False) -> None:
        """Let go of the process: it ends by itself, or is ended by its waiter."""
        kiro, self.kiro = self.kiro, None
        if kiro is None:
            return
        self._places.claim(self._conversation)
        kiro.kept_warm = False
        if not kiro.exit_noticed:
            self.former.append(kiro)
        kiro.end(patience=0 if at_once or kiro.agent is None else END_SECONDS)     # one that still starts holds no lock

    def _await_former(self) -> None:
        """Wait until no former process holds the session's lock; their waiters see to it."""
        limit = time.monotonic() + END_SECONDS + 2 * TERM_SECONDS + LOCK_SECONDS
        while self.former:
            if time.monotonic() > limit:
                raise KiroFailure("The former Kiro process does not end. Ask whoever runs this bot to look at it.")
            self._conversation.wait(limit)

    def request(self, kiro: Kiro, method: str, params: dict, seconds: float) -> dict:
        """The one way to ask Kiro something: return the result.  Asking again goes on with the request in flight.

        Raises KiroFailure; NoPlace when the process was given away meanwhile.
        """
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
        frame = kiro.responses.pop(request_id)
        if "error" in frame:
            raise KiroRefusal(frame["error"])
        return frame["result"] if isinstance(frame.get("result"), dict) else {}

    def check_alive(self, kiro: Kiro, asked_at: float) -> None:
        """Raise if the process can't answer any more: given away, gone, or deaf."""
        if kiro is not self.kiro:
            raise NoPlace
        if kiro.exit_noticed:
            raise kiro.failure()
        patience = min(DEAF_SECONDS, self._settings.silence_seconds / 2)
        if kiro.heard_at < asked_at and time.monotonic() - max(asked_at, kiro.wrote_at) > patience and kiro.is_deaf():
            raise KiroGone(f"Kiro does not read what it is sent (for {patience:g} s).", again=True)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def default_workspace(self) -> str:
        """Return the folder that a new thread gets: {WORKSPACE_BASE_PATH}/{user}/{thread}."""
        return str(self._settings.workspaces / str(self._key[0]) / str(self._key[1]))

    def workspace(self) -> str:
        """Return the folder in which the thread works.  Its default one is made when it is missing; any other is not, and
        where that is gone, as when the bot's folder has moved, the default one takes its place if it is there."""
        record, default = self._store.get_session(*self._key), self.default_workspace()
        path = record.workspace_path if record else default
        try:
            if path != default and not os.path.isdir(path) and os.path.isdir(default):
                self._store.upsert_session(*self._key, record.session_id, default, keep_model=True)
                path = default
            if path == default:
                os.makedirs(path, mode=0o700, exist_ok=True)
        except OSError as error:
            raise KiroFailure(f"The folder {path} can't be made: {error.strerror}.") from error
        if not os.path.isdir(path):
            raise KiroFailure(f"The folder {path} is no longer there.")
        return os.path.realpath(path)

    def _open_session(self, kiro: Kiro) -> None:
        """Load the thread's session, or make one."""
        record = self._store.get_session(*self._key)
        if record is None:
            return self._new_session(kiro)
        had_history = self._store.get_facts(record.session_id)[0]
        if record.session_id == self._lost:
            self._new_session(kiro)
            if had_history:
                self._conversation.notes.add(NOTHING_KEPT if is_empty(record.session_id) else HISTORY_GONE)
            return
        if not kiro.can_load:
            self._new_session(kiro)
            if had_history and not self._no_load_told:
                self._no_load_told = True
                self._conversation.notes.add("ℹ️ This agent can't reload sessions: each message starts without the history.")
            return
        self._await_former()                   # it has the lock, and may still be writing; so may an orphan
        if not had_history and is_empty(record.session_id) and lock_pid(record.session_id) is None:
            return self._new_session(kiro)
        try:
            self._load_session(kiro, record, had_history)
        except KiroFailure as failure:
            if isinstance(failure, KiroLocked) or not session_is_lost(failure, record.session_id, had_history):
                raise
            log.warning("Session %s of %s/%s is lost: %s", record.session_id, *self._key, failure)
            self._lost = record.session_id
            raise SessionLost from failure

    def _new_session(self, kiro: Kiro) -> None:
        """Make a session for this thread; the chosen model stays."""
        result = self.request(kiro, "session/new", {"cwd": kiro.workspace, "mcpServers": []}, SESSION_SECONDS)
        session_id = result.get("sessionId")
        if not isinstance(session_id, str) or not session_id:
            raise KiroFailure("Kiro made no session: its answer to session/new has no sessionId.")
        self._store.upsert_session(*self._key, session_id, kiro.workspace, keep_model=True)
        self.known = Known()
        self._opened(kiro, session_id, result)

    def _load_session(self, kiro: Kiro, record: SessionRecord, had_history: bool) -> None:
        """Load the session, dealing with its lock; what Kiro replays is dropped by the reader [acp 3.3]."""
        params = {"sessionId": record.session_id, "cwd": record.workspace_path, "mcpServers": []}
        limit, pause, missing = time.monotonic() + LOCK_SECONDS, 0.25, is_missing(record.session_id)
        seconds = MISSING_SECONDS if missing or is_empty(record.session_id) else SESSION_SECONDS
        while True:
            try:
                result = self.request(kiro, "session/load", params, seconds)
                break
            except KiroRefusal as refusal:
                pid = lock_holder(str(refusal))
                if pid is None:
                    raise
                settle_lock(pid, record.session_id, self._settings)
                if time.monotonic() > limit:
                    raise KiroLocked(f"The session is still locked by process {pid}. Try again in a minute.") from refusal
            retry_at = time.monotonic() + pause
            while time.monotonic() < retry_at:
                self._conversation.wait(retry_at)
            pause = min(2 * pause, 2)
        self._let_replay_end(kiro)
        if missing and had_history and not kiro.replayed_before_response:      # some agents accept any id [acp 11]
            self._store.set_facts(record.session_id, ended=False, taught=False)
            self._conversation.notes.add(HISTORY_GONE)
        self._opened(kiro, record.session_id, result)

    def _let_replay_end(self, kiro: Kiro) -> None:
        """Some agents replay after their response [acp 11]: wait for a moment of quiet, unless it came before."""
        limit = time.monotonic() + REPLAY_SECONDS
        while not kiro.replayed_before_response and time.monotonic() < min(kiro.heard_at + QUIET_SECONDS, limit):
            self._conversation.wait(min(kiro.heard_at + QUIET_SECONDS, limit))

    def _opened(self, kiro: Kiro, session_id: str, result: dict) -> None:
        """Note what a session/new or session/load has told."""
        kiro.models = models_of(result)
        self.models = kiro.models or self.models
        kiro.session_id = session_id

    def _apply_model(self, kiro: Kiro) -> None:
        """Make Kiro use the model that somebody chose for this thread; where nobody did, it is told nothing."""
        wanted, models = self._store.chosen_model(*self._key), kiro.models or self.models
        if wanted is None or models is None or kiro.models and wanted == kiro.models.current:
            return
        if wanted not in [name for name, _ in models.offered]:
            self._store.unset_model(*self._key)
            self._conversation.notes.add(f"ℹ️ The model {wanted} is no longer offered; this topic is back to Kiro's own choice.")
            return
        if models.config_id is None:
            method, params = "session/set_model", {"modelId": wanted}
        else:
            method, params = "session/set_config_option", {"configId": models.config_id, "value": wanted}
        self.models = kiro.models = models._replace(current=wanted)
        try:
            self.request(kiro, method, {"sessionId": kiro.session_id, **params}, MODEL_SECONDS)
        except (KiroRefusal, KiroSilent) as failure:
            self._conversation.notes.add(f"⚠️ The model may not be {wanted}: {failure}")
        finally:
            kiro.in_flight.pop(method, None)           # after a stop too: the next choice is another request

    def model(self) -> str:
        """Return the thread's model: the one that was chosen, else what Kiro reported last."""
        return self._store.chosen_model(*self._key) or self.models and self.models.current or "auto"

    def model_names(self) -> list[str]:
        """Return the ids of the models that Kiro reported last."""
        return [name for name, _ in self.models.offered] if self.models else []

    def answer_model(self, wanted: str) -> tuple[str, Optional[Buttons]]:
        """Choose a model, or list them when none is wanted; return a text and buttons."""
        names = self.model_names()
        if not names:
            return "Kiro reports no models to choose from.", None
        if wanted and wanted in names:
            self._store.set_model(*self._key, wanted)
            return f"Model for this topic: {wanted}, from the next message on.", None
        chosen = self.model()
        if wanted:
            text = f"Kiro has no model {wanted!r}. The model stays {chosen}. It offers: {', '.join(names)}"
        else:
            text = f"Model for this topic: {chosen}. Choose with /model NAME or here:"
        return text, [[(("✓ " if name == chosen else "") + label, f"model:{self._key[1]}:{model_key(name)}")]
                      for name, label in self.models.offered]

    # -- what is known of the session ----------------------------------------------------------------------------------

    def hear(self, kiro: Kiro, method: str, params: dict) -> None:
        """Take in what a notification says about the session [acp 3.8, 11]."""
        name, update, status = method.partition("/")[2], params.get("update"), params.get("status")
        if name == "metadata":
            percent = finite(params.get("contextUsagePercentage"))
            self.known.context = self.known.context if percent is None else percent
        elif name == "clear/status" or name == "compaction/status" and "completed" in (status, as_dict(status).get("type")):
            self._forgotten(kiro)
        elif as_dict(update).get("sessionUpdate") == "usage_update":
            used, size = finite(update.get("used")), finite(update.get("size"))
            if used is not None and size:
                self.known.context = 100 * used / size

    def _forgotten(self, kiro: Kiro) -> None:
        """Kiro may have forgotten the tags."""
        self.known.full_told = False
        kiro.lesson = ""
        if kiro.session_id:
            self._note_facts(kiro.session_id, taught=False)

    def lesson(self, wanted: bool) -> list[dict]:
        """Return what tells Kiro of the tags, as content blocks for its next prompt; none where it knows them."""
        known = self._store.get_facts(self.kiro.session_id)[1]
        self.kiro.lesson = "known" if known else "sent" if wanted else ""
        return [{"type": "text", "text": LESSON}] if self.kiro.lesson == "sent" else []

    def turn_ended(self, kiro: Kiro, properly: bool) -> None:
        """A turn of the session has ended, by itself or not: it has a history, and may know the tags now."""
        self.known.refusals.clear()
        self._note_facts(kiro.session_id, taught=kiro.lesson == "known" or kiro.lesson == "sent" and properly)

    def _note_facts(self, session_id: str, taught: bool) -> None:
        """Note that the session has a history, and whether Kiro knows the tags; no reason to lose an answer."""
        try:
            self._store.set_facts(session_id, ended=True, taught=taught)
        except StoreError as error:
            log.error("What is known of a session can't be noted: %s", error)

    def nearly_full(self) -> str:
        """Return a remark when the context is nearly used up, once."""
        known = self.known
        if known.context is None or known.context < FULL_CONTEXT or known.full_told:
            return ""
        known.full_told = True
        return f"ℹ️ {known.context:.0f} % of this session's context is used. /compact shortens it, /new starts afresh."

    def advice(self, failure: KiroFailure) -> str:
        """Return what to do about it, when there is something more to say than to ask again."""
        text = str(failure)
        if NOT_LOGGED_IN.search(text):
            return "\nOn the server, as the bot's user: kiro-cli login --use-device-flow (or set KIRO_API_KEY)."
        if not isinstance(failure, KiroRefusal) or PASSING.search(text):
            return ""
        same = re.sub(r"[0-9a-f-]{8,}|\d+", "", text)
        self.known.refusals = [r for r in self.known.refusals if r == same] + [same]
        if len(self.known.refusals) >= SAME_REFUSALS:
            return "\nThis session refuses every message in the same way. /new starts a fresh one, /compact may help too."
        return ""


# ======================================================================================================================
# Kiro: one child process speaking ACP, and the locks on its sessions
# ======================================================================================================================

INITIALIZE = {"protocolVersion": 1, "clientInfo": {"name": "tg-acp", "version": "1"},
              "clientCapabilities": {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False}}
LINE_AT_MOST = 32 * 1024 * 1024
STDERR_KEPT = 4000              # bytes
END_SECONDS = 5                 # from the end of stdin to TERM [acp 10]
TERM_SECONDS = 2                # from TERM to KILL
LEFTOVER_SECONDS = 0.5          # for what a process leaves behind to end after TERM, and after KILL
FOLDER_MARK, OWNER_MARK, PROCESS_MARK = "TG_ACP_BOT", "TG_ACP_OWNER", "TG_ACP_PROCESS"   # in our children's environment
NOT_LOGGED_IN = re.compile(r"not\s+logged\s+in|authentication required|ExpiredToken|InvalidGrant|TokenExpired|AccessDenied",
                           re.I)
PASSING = re.compile(r"throttl|too ?many ?requests|usage limit|timed out", re.I)     # another session would not help [acp 4.5]
LOCKED = re.compile(r"active in another process \(PID (\d+)\)")
LOST = re.compile(r"session.{0,80}(not found|does ?n.t exist|does not exist|unknown|no such|not exist)|"
                  r"(unknown|no such|invalid|missing) session|no session (with|by|for|of|named)|resource.not.found",
                  re.I | re.S)
RESOURCE_NOT_FOUND = -32002
HISTORY = {"user_message_chunk", "agent_message_chunk", "agent_thought_chunk", "tool_call", "tool_call_update"}   # a replay's


class Models(NamedTuple):
    """The models that Kiro reports for a session."""
    offered: list[tuple[str, str]]      # (id, label)
    current: str                        # id
    config_id: Optional[str]            # of session/set_config_option; None: session/set_model


class Kiro:
    """One Kiro process.  Its frames go to `post`, in order, as events of a conversation:
    ("response", kiro, frame), ("permission", kiro, id, params), ("notification", kiro, method, params), ("exit", kiro).

    It has a place, which its waiter gives back when nothing of it is left.
    """

    def __init__(self, bot: Bot, workspace: str, post: Callable[..., None]) -> None:
        """Start the process.  Raises OSError, and Closing."""
        self._bot, self._post = bot, post
        self.workspace = workspace
        self.mark = f"{os.getpid()}.{secrets.token_hex(6)}"
        self.heard_at = self.wrote_at = time.monotonic()
        self.agent: Optional[dict] = None        # its answer to initialize
        self.session_id = ""                     # once it is loaded
        self.models: Optional[Models] = None
        self.lesson = ""                         # about the bot's tags: "known" to the session, or "sent" with this prompt
        self.kept_warm = False                   # counted among the warm ones
        self.exit_noticed = False                # by the conversation, which had handled all earlier frames then
        self.in_flight: dict[str, tuple[int, float]] = {}     # by method: request id, when it was sent
        self.responses: dict[int, dict] = {}
        self.turn_open = False                   # between a prompt and its response
        self.replayed_before_response = False
        self.gone = threading.Event()            # the process and all it left behind have ended
        self._trouble = ""                       # why it had to be ended
        self._stderr = b""
        self._next_id = 0
        self._prompt_id = 0
        self._outgoing: queue.SimpleQueue[Optional[bytes]] = queue.SimpleQueue()
        self._lock = threading.Lock()            # between a signal and the moment when the pid may be another's
        self._reaped = self._ending = False
        self._popen = self._start(bot)
        self._start_threads()

    def _start(self, bot: Bot) -> subprocess.Popen:
        """Start the process and list it, unless the bot is closing.  Raises OSError, and Closing."""
        with bot.spawning:
            if bot.closing.is_set():
                raise Closing
            popen = subprocess.Popen(
                bot.settings.kiro_command, cwd=self.workspace, env=child_environment(bot.settings, self.mark, self.workspace),
                start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=65536)
            self.pid = popen.pid
            bot.processes.add(self)
            return popen

    def _start_threads(self) -> None:
        """Start the process's four threads.  Raises OSError when there are none to be had; the process is ended then."""
        try:
            self._reader = self._thread(self._read, "reader")
            self._stderr_reader = self._thread(self._drain, "stderr")
            self._thread(self._write, "writer")
            self._thread(self._await_exit, "waiter")
        except RuntimeError as error:            # and so no waiter, which would see to its end
            self._outgoing.put(None)
            with self._lock:
                _kill(-self.pid, signal.SIGKILL)
                self._popen.wait()
                self._reaped = True
            self.gone.set()
            self._bot.processes.discard(self)
            raise OSError(0, str(error)) from error

    def _thread(self, target: Callable[[], None], role: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"{role} of {self.pid}", daemon=True)
        thread.start()
        return thread

    # -- to Kiro: nothing here waits, the writer does ------------------------------------------------------------------

    def request(self, method: str, params: dict) -> tuple[int, float]:
        """Send a request; return its id and the time.  The response comes as an event."""
        self._next_id += 1
        self._send({"id": self._next_id, "method": method, "params": params})
        return self._next_id, time.monotonic()

    def prompt(self, blocks: list[dict]) -> tuple[int, float]:
        """Begin a turn; until its response, updates and permission requests are let through."""
        self._prompt_id, self.turn_open = self._next_id + 1, True
        return self.request("session/prompt", {"sessionId": self.session_id, "prompt": blocks})

    def respond(self, request_id: Any, result: dict) -> None:
        """Answer a request of Kiro's."""
        self._send({"id": request_id, "result": result})

    def cancel(self) -> None:
        """Ask Kiro to end the turn, if there is one."""
        if self.turn_open:
            self._send({"method": "session/cancel", "params": {"sessionId": self.session_id}})

    def _send(self, frame: dict) -> None:
        self._outgoing.put(json.dumps({"jsonrpc": "2.0", **frame}).encode() + b"\n")

    def _write(self) -> None:
        try:
            while (data := self._outgoing.get()) is not None:
                for start in range(0, len(data), 65536):
                    self._popen.stdin.write(data[start:start + 65536])
                    self._popen.stdin.flush()
                    self.wrote_at = time.monotonic()
        except OSError:          # it has exited; the waiter tells
            pass
        try:
            self._popen.stdin.close()
        except OSError:          # the same
            pass

    def is_deaf(self) -> bool:
        """Are there bytes in the pipe that it has not read?"""
        try:
            unread = fcntl.ioctl(self._popen.stdin, termios.FIONREAD, b"\0\0\0\0")
        except (OSError, ValueError):    # closed
            return False
        return struct.unpack("i", unread)[0] > 0

    # -- from Kiro -----------------------------------------------------------------------------------------------------

    @property
    def can_load(self) -> bool:
        """Does the agent say that it can reload sessions?  Kiro does."""
        capabilities = (self.agent or {}).get("agentCapabilities")
        return isinstance(capabilities, dict) and bool(capabilities.get("loadSession"))

    @property
    def takes_images(self) -> bool:
        """Does the agent take image blocks?"""
        capabilities = (self.agent or {}).get("agentCapabilities") or {}
        return bool((capabilities.get("promptCapabilities") or {}).get("image"))

    def _read(self) -> None:
        try:
            while line := self._popen.stdout.readline(LINE_AT_MOST + 1):
                if len(line) > LINE_AT_MOST:
                    self._trouble = f"Kiro sent a line of more than {LINE_AT_MOST >> 20} MB"
                    break
                self._take(line)
        except (OSError, ValueError) as error:
            log.debug("Reading from Kiro %s: %s", self.pid, error)
        self._popen.stdout.close()
        if not self._reaped:         # without stdout it is of no use any more
            self.end(patience=0.5)

    def _take(self, line: bytes) -> None:
        """Pass one frame on: a response, a request, a notification, or junk [acp 2]."""
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):
            if line.strip():
                log.debug("Not JSON from Kiro %s: %.200r", self.pid, line)
            return
        if not isinstance(frame, dict):
            return
        self.heard_at = time.monotonic()
        method, params = frame.get("method"), frame.get("params")
        params = params if isinstance(params, dict) else {}
        if not isinstance(method, str):
            self._take_response(frame)
        elif "id" in frame:
            self._take_request(frame["id"], method, params)
        elif self._is_of_interest(method, params):
            self._post("notification", self, method, params)

    def _take_response(self, frame: dict) -> None:
        if not isinstance(frame.get("id"), int) or frame["id"] > self._next_id:
            return log.debug("A response to nothing from Kiro %s", self.pid)
        if frame["id"] == self._prompt_id:
            self.turn_open = False
        self._post("response", self, frame)

    def _take_request(self, request_id: Any, method: str, params: dict) -> None:
        """Permission is asked for in turns only; nothing else was agreed on."""
        if method != "session/request_permission":
            error = {"code": -32601, "message": f"Method not found: {method}"}
            self._send({"id": request_id, "error": error})
        elif self.turn_open:
            self._post("permission", self, request_id, params)
        else:
            self.respond(request_id, {"outcome": {"outcome": "cancelled"}})

    def _is_of_interest(self, method: str, params: dict) -> bool:
        """What is said outside a turn is replay, and so is dropped here; extensions may come at any time."""
        if method != "session/update":
            return method.startswith("_kiro") and (not self.session_id or params.get("sessionId") in (None, self.session_id))
        update = params.get("update")
        if not self.session_id and isinstance(update, dict) and update.get("sessionUpdate") in HISTORY:
            self.replayed_before_response = True
        return self.turn_open and params.get("sessionId") in (None, self.session_id)

    def _drain(self) -> None:
        try:
            while data := self._popen.stderr.read1(65536):
                self._stderr = (self._stderr + data)[-STDERR_KEPT:]
                log.debug("Kiro %s says: %.500r", self.pid, data)
        except (OSError, ValueError):    # closed
            pass
        self._popen.stderr.close()

    def how_it_ended(self) -> str:
        """Return the exit status, and the end of stderr."""
        if self._trouble:
            return self._trouble
        code = self._popen.returncode
        if code is None:
            return "it closed its output"
        name = f"exit status {code}" if code >= 0 else f"signal {-code}"
        said = self._stderr.decode(errors="replace").strip()
        return f"{name}: {said[-600:]}" if said else name

    def failure(self) -> KiroGone:
        """Return the failure to raise when the process has gone.  Wrong usage and login are not worth a second try."""
        told = self.how_it_ended()
        final = self._popen.returncode == 2 or NOT_LOGGED_IN.search(told) or self._trouble
        return KiroGone(f"Kiro has exited ({told}).", again=not final)

    # -- its end -------------------------------------------------------------------------------------------------------

    def end(self, patience: Optional[float]) -> None:
        """Close stdin, which is the clean way [acp 4.1]; TERM after `patience` seconds, then KILL.  None: no signals."""
        self.turn_open = False
        self._outgoing.put(None)
        with self._lock:
            enforce = patience is not None and (not self._ending or patience == 0)
            self._ending = self._ending or enforce
        if not enforce:
            return
        try:
            threading.Thread(target=self._enforce_end, args=(patience,), name=f"ender of {self.pid}", daemon=True).start()
        except RuntimeError as error:    # no thread to be had, and nobody will come back to it
            log.error("Kiro %s is ended at once: %s", self.pid, error)
            self.signal(signal.SIGKILL)

    def _enforce_end(self, patience: float) -> None:
        if self.gone.wait(patience):
            return
        self.signal(signal.SIGTERM)
        if self.gone.wait(TERM_SECONDS):
            return
        self.signal(signal.SIGKILL)

    def signal(self, number: int, leftovers: bool = False) -> None:
        """Signal the process group, since kiro-cli does not pass signals on [acp 4.2], and if asked what else is left."""
        with self._lock:
            if not self._reaped:
                _kill(-self.pid, number)
        for pid in self._leftovers() if leftovers else ():
            _kill(pid, number)

    def _await_exit(self) -> None:
        """The waiter: see the process and all it leaves behind to their end, give back its place, tell."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)      # not reaped yet: the pid is still its own
        self._reader.join(0.5)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._leftovers():
                break
            self.signal(number, leftovers=True)
            limit = time.monotonic() + LEFTOVER_SECONDS
            while self._leftovers() and time.monotonic() < limit:
                time.sleep(0.01)
        with self._lock:
            self._popen.wait()
            self._reaped = True
        self._reader.join(1)
        self._stderr_reader.join(0.2)
        self._outgoing.put(None)
        if self.session_id:
            remove_dead_lock(self.session_id)
        self._bot.processes.discard(self)
        self.gone.set()
        self._bot.places.give_back()
        self._post("exit", self)

    def _leftovers(self) -> list[int]:
        """Return the processes that this one has started and that still run."""
        return [pid for pid in related_processes(self.mark, self.pid) if pid != self.pid]


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def child_environment(settings: Settings, mark: str, workspace: str = "") -> dict[str, str]:
    """Return Kiro's environment: ours without the token, with the marks by which a later run knows its orphans, and
    without git finding the bot's own checkout above an empty workspace."""
    secret = settings.token or "\0"
    env = {name: value for name, value in os.environ.items() if name != "BOT_TOKEN" and secret not in value}
    parent = os.path.dirname(workspace)        # elsewhere, if WORKSPACE_BASE_PATH was changed since the thread began
    ceilings = [str(settings.workspaces), *filter(None, [parent]), *filter(None, [env.get("GIT_CEILING_DIRECTORIES")])]
    return {**env, "GIT_CEILING_DIRECTORIES": os.pathsep.join(ceilings), FOLDER_MARK: str(settings.folder),
            OWNER_MARK: owner_mark(), PROCESS_MARK: mark}


def finite(value: Any) -> Optional[float]:
    """Return a number that can be reckoned with and shown, or None: JSON's may be of any size."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else None


def as_dict(value: Any) -> dict:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def error_text(error: Any) -> str:
    """Return what a JSON-RPC error says; Kiro puts it into `data`, a string or an object [acp 3.4]."""
    if not isinstance(error, dict):
        return str(error)
    data = error.get("data")
    if isinstance(data, dict):
        data = next((data[key] for key in ("details", "message", "error") if data.get(key)), None) or json.dumps(data)
    text = data or error.get("message") or "an error without a text"
    return text if isinstance(text, str) else json.dumps(text)


def models_of(result: dict) -> Optional[Models]:
    """Return the models of a session/new or session/load result, in either dialect [acp 8, 11], or None."""
    try:
        return _models_of_kiro(result.get("models")) or _models_of_options(result.get("configOptions") or ())
    except (TypeError, KeyError, AttributeError) as error:
        log.warning("The agent's list of models can't be read: %r", error)
        return None


def _models_of_kiro(models: Any) -> Optional[Models]:
    offered = [(m["modelId"], str(m.get("name") or m["modelId"])) for m in (models or {}).get("availableModels") or ()]
    return Models(offered, models.get("currentModelId") or "", None) if offered else None


def _models_of_options(options: Any) -> Optional[Models]:
    for option in options:
        if option.get("category") == "model" and option.get("options"):
            choices = [c for o in option["options"] for c in (o["options"] if "options" in o else [o])]   # groups, or not
            offered = [(c["value"], str(c.get("name") or c["value"])) for c in choices]
            return Models(offered, option.get("currentValue") or "", option.get("id") or "")
    return None


# -- locks and lost sessions -------------------------------------------------------------------------------------------

def sessions_folder() -> Path:
    """Return where Kiro keeps its sessions [acp 4.1]."""
    return Path(os.environ.get("KIRO_HOME") or Path.home() / ".kiro") / "sessions" / "cli"


def session_file(session_id: str, extension: str) -> Optional[Path]:
    """Return the path of one of a session's files; None for an id that could lead elsewhere."""
    return sessions_folder() / f"{session_id}.{extension}" if re.fullmatch(r"[\w-]+", session_id) else None


def session_is_lost(failure: KiroFailure, session_id: str, had_history: bool) -> bool:
    """Decide whether Kiro does not have the session any more; a passing trouble must not throw one away.

    Kiro has no clean error for it [acp 3.3]: when the answer does not say so, the session's missing file does.
    """
    if NOT_LOGGED_IN.search(str(failure)):
        return False
    if is_empty(session_id):
        return True
    path = session_file(session_id, "json")
    if path is not None and path.exists() and had_history:
        return False
    if isinstance(failure, KiroRefusal) and (failure.code == RESOURCE_NOT_FOUND or LOST.search(str(failure))):
        return True
    return is_missing(session_id) or (not had_history and isinstance(failure, KiroRefusal))


def is_missing(session_id: str) -> bool:
    """Is it plain to see that Kiro has no such session?  Not where its sessions are out of sight."""
    path = session_file(session_id, "json")
    return path is not None and path.parent.is_dir() and not path.exists()


def is_empty(session_id: str) -> bool:
    """Is it plain to see that Kiro kept nothing of the session?  Such a one need not load [acp 3.3]."""
    path = session_file(session_id, "jsonl")
    try:
        return path is not None and not path.stat().st_size
    except OSError:
        return False


def lock_holder(text: str) -> Optional[int]:
    """Return the pid in Kiro's refusal to load a locked session, or None."""
    match = LOCKED.search(text)
    return int(match[1]) if match else None


def settle_lock(pid: int, session_id: str, settings: Settings) -> None:
    """Do what can be done about the process that holds a session's lock; return when loading may be tried again.

    A dying process of ours: nothing, its waiter ends it.  An orphan of ours: end it.  A dead process: remove its lock.
    Raises KiroLocked for a living stranger.
    """
    if is_running(pid) and environment_of(pid).get(OWNER_MARK) == owner_mark():
        return
    if end_orphan(pid, settings):
        return
    if is_running(pid) and holds_lock(pid, session_id, settings):
        raise KiroLocked(f"This topic's session is open in another program (process {pid}). Close it there, then ask again.")
    remove_dead_lock(session_id, pid)


def owner_mark() -> str:
    """Return what tells this process from all others, also from later ones with its pid."""
    return f"{os.getpid()}.{started(os.getpid())}"


def end_orphan(pid: int, settings: Settings) -> bool:
    """If the process is a Kiro that a former run of this folder's bot has left behind, end it with all that is its."""
    env = environment_of(pid)
    owner, _, began = env.get(OWNER_MARK, "").partition(".")
    if env.get(FOLDER_MARK) != str(settings.folder) or not owner.isdigit() or started(int(owner)) == began:
        return False
    log.warning("Ending process %s, which a former run has left behind", pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for other in {pid, *related_processes(env.get(PROCESS_MARK, "none"))}:
            _kill(other, number)
        limit = time.monotonic() + TERM_SECONDS
        while is_running(pid) and time.monotonic() < limit:
            time.sleep(0.02)
        if not is_running(pid):
            break
    return True


def holds_lock(pid: int, session_id: str, settings: Settings) -> bool:
    """Is the running process the one that took the lock, or has its pid been given to another since [acp 4.1]?"""
    command_line = _proc(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").lower()
    names = {"kiro", *(os.path.basename(word).lower() for word in settings.kiro_command if not word.startswith("-"))}
    if not any(name in command_line for name in names):
        return False
    locked_at = lock_time(session_id)
    return locked_at is None or start_time(pid) <= locked_at + 2


def lock_time(session_id: str) -> Optional[float]:
    """Return when the lock was taken, in seconds since the epoch, or None."""
    path = session_file(session_id, "lock")
    try:
        text = json.loads(path.read_text())["started_at"] if path else ""
        match = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)?", text)
        zone = match[3] if match[3] and match[3] != "Z" else "+00:00"
        return datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}").timestamp()
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_dead_lock(session_id: str, pid: Optional[int] = None) -> None:
    """Remove the session's lock if its process is dead, or is the given one, known to be another's pid by now."""
    path, holder = session_file(session_id, "lock"), lock_pid(session_id)
    try:
        if path is None or not path.exists():
            return
        if holder is None and (pid is None or is_running(pid) or time.time() - path.stat().st_mtime < 2):
            return                             # it names nobody: only when Kiro has met it, and nobody is just writing it
        if holder is not None and holder != pid and is_running(holder):
            return
        path.unlink()
        log.info("Removed the lock that dead process %s left on session %s", holder, session_id)
    except OSError as error:
        log.error("A dead lock can't be removed: %s: %s", path, error.strerror)


def lock_pid(session_id: str) -> Optional[int]:
    """Return the process that the session's lock names; None when there is no lock that could be understood."""
    path = session_file(session_id, "lock")
    try:
        return int(json.loads(path.read_text())["pid"]) if path else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


# -- processes, by /proc -----------------------------------------------------------------------------------------------

def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the third on (state, ppid, pgrp, ...); none when there is no process."""
    return _proc(pid, "stat").rpartition(b")")[2].split()


def is_running(pid: int) -> bool:
    """Does the process exist, and not as a zombie?"""
    state = _stat(pid)[:1]
    if state or pid <= 0:        # 0 and less name groups
        return state not in ([], [b"Z"], [b"X"])
    try:
        os.kill(pid, 0)          # there may be no descriptor to be had for /proc
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:      # somebody else's
        pass
    return True


def started(pid: int) -> str:
    """Return when the process was started, in clock ticks since boot; with the pid it names one process for ever."""
    return b"".join(_stat(pid)[19:20]).decode()


def start_time(pid: int) -> float:
    """Return when the process was started, in seconds since the epoch."""
    ticks = started(pid)
    boot = re.search(rb"^btime (\d+)", Path("/proc/stat").read_bytes(), re.M)
    return int(boot[1]) + int(ticks) / os.sysconf("SC_CLK_TCK") if boot and ticks else 0.0


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that the process was started with; empty when it is not ours to see."""
    pairs = (pair.partition(b"=") for pair in _proc(pid, "environ").split(b"\0"))
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs}


def related_processes(mark: str, group: int = -1) -> list[int]:
    """Return the running processes that carry the process mark in their environment, or are of the process group."""
    needle, pgrp = f"{PROCESS_MARK}={mark}".encode(), str(group).encode()
    try:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError as error:     # no descriptor to be had: nobody can be found now
        log.error("Processes can't be listed: %s", error.strerror)
        pids = []
    return [pid for pid in pids
            if (needle in _proc(pid, "environ").split(b"\0") or _stat(pid)[2:3] == [pgrp]) and is_running(pid)]


# ======================================================================================================================
# Answer: what Kiro says, as it comes and as it stays
# ======================================================================================================================

class Answer:
    """What Kiro has said and done in a turn: frames in, text out.  It knows no clock and no thread."""

    def __init__(self) -> None:
        self.length = 0                        # characters
        self.version = 0                       # another one whenever the text is another
        self.heard = False                     # text, a tool call or a permission request came
        self.grace: Optional[float] = None     # seconds within which the response is to come now
        self.running = ""                      # the title of the tool that was heard of last, while it runs
        self.trouble = ""                      # Kiro's last word about limits, retries and compaction
        self.credits: Optional[float] = None   # what it cost, if Kiro told
        self._pieces: list[str] = []
        self._attempt = 0                      # how many pieces were there when Kiro's present attempt began
        self._gap = False                      # a tool lies between the last piece and the next
        self._cut = False                      # it said more than anybody can read
        self._tools: dict[str, dict] = {}      # calls that have not ended, by id
        self._last_tool = ""                   # the last one that did, and how

    def hear(self, method: str, params: dict) -> None:
        """Take in a notification; what says nothing about the answer is left aside [acp 3.5, 3.8]."""
        name, update = method.partition("/")[2], params.get("update")
        if method == "session/update" and isinstance(update, dict):
            self._hear_update(update)
        elif name == "session/update" and isinstance(update, dict):
            self._hear_trouble(update)
        elif name == "metadata" and isinstance(params.get("meteringUsage"), list):
            values = [finite(entry.get("value")) for entry in params["meteringUsage"] if isinstance(entry, dict)]
            self.credits = sum(value for value in values if value is not None)
        elif name == "error/rate_limit":
            self.trouble = str(params.get("message") or "Kiro is being rate-limited")
        elif name == "compaction/status":
            self._hear_compaction(params.get("status"))

    def _hear_update(self, update: dict) -> None:
        kind, content = update.get("sessionUpdate"), update.get("content")
        if kind == "agent_message_chunk":
            text = content.get("text") if isinstance(content, dict) else None
            if isinstance(text, str) and text:
                self.say(text)
        elif kind in ("tool_call", "tool_call_update"):
            self._hear_tool(update)
        elif kind == "turn_end":
            self.grace = AFTERWORD_SECONDS

    def say(self, text: str) -> None:
        """Add a piece of the answer, set apart when a tool lies between."""
        self._cut = self.length > ANSWER_AT_MOST
        if self._cut:
            return
        if self._gap and self._pieces:
            end = "".join(self._pieces[-2:])
            self._pieces.append("\n" * (2 - min(2, len(end) - len(end.rstrip("\n")))))
        self._pieces.append(text)
        self.length += len(text)
        self.version += 1
        self.heard, self._gap, self.running, self.trouble = True, False, "", ""
        self.grace = INTERRUPTED_SECONDS if text.strip() == INTERRUPTED else None

    def _hear_tool(self, update: dict) -> None:
        """A tool call begins, tells something, or ends; v2 gives no status at its beginning."""
        tool_id = str(update.get("toolCallId"))
        call = self._tools.pop(tool_id, {})
        call.update({key: update[key] for key in ("title", "kind", "rawInput", "content") if update.get(key) is not None})
        title, status = str(call.get("title") or call.get("kind") or "a tool"), update.get("status")
        if status in ("completed", "failed"):
            self.running = "" if title == self.running else self.running
            self._last_tool = "\n".join([f"{title}: {status}", *content_texts(call.get("content"))])
        else:
            self._tools[tool_id] = call
            self.running = title
            if len(self._tools) > TOOLS_KEPT:
                del self._tools[next(iter(self._tools))]
        self.heard = self._gap = True
        self.grace = None
        self._attempt = len(self._pieces)

    def _hear_trouble(self, update: dict) -> None:
        """Kiro starts its present attempt anew, or says why it has to wait."""
        kind = update.get("sessionUpdate")
        if kind == "stream_discarded":
            del self._pieces[self._attempt:]
            self.length, self._gap = sum(map(len, self._pieces)), bool(self._pieces)
            self.version += 1
        elif kind in ("retry_warning", "stream_stall_notice"):
            self.trouble = str(update.get("message") or "Kiro tries again")

    def _hear_compaction(self, status: Any) -> None:
        """Kiro compacts the conversation, on /compact or by itself; a turn may say nothing else."""
        kind, error = (status.get("type"), status.get("error")) if isinstance(status, dict) else (status, None)
        self.trouble = {"started": "Compacting the conversation…", "completed": "The conversation was compacted.",
                        "failed": f"⚠️ The conversation could not be compacted: {error or 'Kiro does not say why'}",
                        }.get(str(kind), "")

    def text(self) -> str:
        """Return what Kiro has said so far."""
        return whole_characters("".join(self._pieces)).strip("\n")

    def describe(self, tool_call: dict) -> str:
        """Return the question about a tool call: what it is, and each of its arguments, in plain sight."""
        call = {**self._tools.get(str(tool_call.get("toolCallId")), {}), **tool_call}
        title, kind, raw = str(call.get("title") or "use a tool"), call.get("kind"), call.get("rawInput")
        named = f" ({kind})" if isinstance(kind, str) and kind not in ("other", "execute") and kind not in title.lower() else ""
        lines = [f"❓ Kiro wants to: {title}{named}"]
        for name, value in raw.items() if isinstance(raw, dict) else [("", raw)] if raw else ():
            shown = value if isinstance(value, str) else " ".join(value) if is_texts(value) else json.dumps(value, ensure_ascii=False)
            if not title.endswith(shown):
                lines.append(counted(f"{name}: {shown}" if name else shown, ARGUMENT_LIMIT))
        lines += [counted(text, ARGUMENT_LIMIT) for text in content_texts(call.get("content"))]
        locations = call.get("locations") if isinstance(call.get("locations"), list) else []
        for path in (place.get("path") for place in locations if isinstance(place, dict)):
            if isinstance(path, str) and not any(path in line for line in lines):
                lines.append(path)
        return counted(in_plain_sight("\n".join(lines)), QUESTION_LIMIT)

    def parts(self, outcome: Outcome, notes: str, remarks: list[str]) -> list[dict]:
        """Return the whole answer for the journal: notes, what Kiro said, remarks."""
        text, remarks = self.text(), [outcome.remark, *remarks]
        said = [{"kind": "answer", "text": text}] if text.strip() else []
        if outcome.stopped and said:
            said[0]["end"] = remarks.pop(0)
        if self._cut:
            remarks.append(f"⚠️ The answer went on after {ANSWER_AT_MOST >> 20} million characters; the rest is left out.")
        if not said and not any(remarks):
            remarks.append(self.trouble or self._last_tool or NOTHING_SAID)
        parts = plain_parts(notes) + said + plain_parts("\n\n".join(filter(None, remarks)))
        if outcome.offer:
            parts[-1]["offer"] = True
        return parts


def content_texts(content: Any) -> Iterator[str]:
    """Yield what a tool call's content shows: texts, and changes to files as lines with - and +."""
    for block in content if isinstance(content, list) else ():
        if not isinstance(block, dict):
            continue
        inner = block.get("content")
        if isinstance(inner, dict) and isinstance(inner.get("text"), str):
            yield inner["text"]
        elif block.get("type") == "diff":
            old, new = (str(block.get(key) or "").splitlines() for key in ("oldText", "newText"))
            yield str(block.get("path"))
            yield from filter(None, changed_lines(old, new))


def changed_lines(old: list[str], new: list[str]) -> tuple[str, str]:
    """Return the lines that go, with -, and those that come, with +: what lies between the same beginning and end."""
    before = len(os.path.commonprefix([old, new]))
    after = len(os.path.commonprefix([old[before:][::-1], new[before:][::-1]]))
    return ("\n".join(f"- {line}" for line in old[before:len(old) - after]),
            "\n".join(f"+ {line}" for line in new[before:len(new) - after]))


def is_texts(value: Any) -> bool:
    """Is it a list of nothing but texts, as a command may be given?"""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def counted(text: str, limit: int) -> str:
    """Return the text, or its beginning and how much more there is."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n⚠️ {len(text) - limit} more characters are not shown."


class Draft:
    """A turn's streamed preview.  Used on the conversation's thread; `stopped` is set under its lock."""

    def __init__(self, chat: Topic | Terminal) -> None:
        self._chat = chat
        self.id = random.randint(1, 2**31 - 1)
        self.stopped = False                   # by its button: Telegram wants no more frames of it [tg 1.3]
        self._shown: Optional[tuple[int, str]] = None       # the answer's version and the status in its last frame
        self._sent_at: Optional[float] = None

    def hide(self) -> None:
        """A message in the topic has taken its place [tg 1.5]."""
        self._shown = None

    def refresh(self, answer: Answer, status: str) -> float:
        """Send a frame if there is news, or the last one is about to expire; return when to look again."""
        now, news = time.monotonic(), (answer.version, status)
        if self.stopped:
            return math.inf
        if self._sent_at is not None and news == self._shown and now < self._sent_at + KEEP_ALIVE_SECONDS:
            return self._sent_at + KEEP_ALIVE_SECONDS
        wait = self._chat.frame_wait(self._sent_at, now)
        if wait:
            return now + wait
        self._sent_at = now
        said, _ = visible_text(answer.text(), still_coming=True)
        self._shown = news if self._chat.frame(self.id, said, status) else None
        return time.monotonic()


class Delivery:
    """Brings a topic's answers to Telegram, part by part, also those of a former run.  On the conversation's thread.

    A part is one lasting message, as JSON-able dict: {"kind": "plain" | "rich", "text"} or {"kind": "file", "path",
    "caption"}; {"kind": "answer", "text", "end"?} is what Kiro said, not yet cut and made safe.  One with "offer" has the
    buttons to ask its turn again or to drop it.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._store, self._chat = conversation, conversation.store, conversation.chat
        self.sending = False                   # a part is on its way, and not ticked off yet; read by the main thread
        self.unsent: list[str] = []            # files that could not be sent, for Kiro to hear of

    def send(self, turn_id: Optional[int], parts: list[tuple[int, dict]], offer: bool, former: bool = False) -> None:
        """Send (position, part) in order, and tick each off when Telegram has it; `former`: a former run began to."""
        left = deque(parts)
        try:
            while left:
                position, part = left.popleft()
                pieces = self._pieces(part, former) if part["kind"] == "answer" else self._send_part(turn_id, position, part)
                if pieces:
                    if part.get("offer"):
                        pieces[-1]["offer"] = True
                    left = deque(enumerate([*pieces, *(part for _, part in left)]))
                    self._rejournal(turn_id, [part for _, part in left])
            if turn_id is not None:
                self._store.finish(turn_id, offer)
        except Unreachable as error:
            log.error("An answer to %s/%s stays in the journal: %s", *self._conversation.key, error)
        except StoreError as error:
            log.error("The end of a turn can't be journaled: %s", error)

    def _rejournal(self, turn_id: Optional[int], parts: list[dict]) -> None:
        """Journal the parts that are left in their new form; no reason not to send them."""
        try:
            if turn_id is not None:
                self._store.set_parts(turn_id, [json.dumps(part) for part in parts])
        except StoreError as error:
            log.error("The parts of an answer can't be journaled: %s", error)

    def _pieces(self, answer: dict, former: bool) -> list[dict]:
        """Return the messages and files that an answer becomes.

        That it still stands in the journal as Kiro gave it means that a former run could not format it: it goes as it is.
        """
        text, end = answer["text"], answer.get("end", "")
        if former:
            return plain_parts(text, simple_pieces)
        try:
            shown, files = visible_text(text)
            shown = f"{close_code(shown)}\n\n{end}" if end and shown.strip() else shown if shown.strip() else end
            pieces = self._chat.parts(shown) if shown else []
        except Exception:   # a bug there must not cost an answer
            log.exception("An answer can't be formatted and is sent as it is")
            return plain_parts(text, simple_pieces)
        return pieces + [{"kind": "file", "path": path, "caption": caption} for path, caption in files] or plain_parts(NOTHING_SAID)

    def _send_part(self, turn_id: Optional[int], position: int, part: dict) -> list[dict]:
        """Send a part and tick it off; return what Telegram is to get instead, if it did not take it as it is."""
        self.sending = True
        try:
            if part["kind"] == "file":
                pieces = self._send_file(part)
            else:
                pieces = self._chat.send(part, offer_buttons(turn_id) if part.get("offer") else None)
            if not pieces and turn_id is not None:
                self._store.tick(turn_id, position)
            return pieces
        except StoreError as error:
            log.error("A part that was sent can't be ticked off: %s", error)
            return []
        finally:
            self.sending = False

    def _send_file(self, part: dict) -> list[dict]:
        """Send a file; return a message in its place if that can't be."""
        try:
            refusal = self._chat.send_file(part["path"], part["caption"], self._conversation.agent.workspace())
        except (StoreError, KiroFailure) as error:
            refusal = f"its folder is not to be had: {error}"
        if not refusal:
            return []
        self.unsent.append(f"{part['path']}: {refusal}")
        return plain_parts(f"⚠️ Kiro wanted to send {part['path']}, but {refusal}.")


def offer_buttons(turn_id: Optional[int]) -> Optional[Buttons]:
    """Return the buttons of a turn that may be asked again; none for one that could not be journaled."""
    return [[("Ask again", f"again:{turn_id}"), ("Drop", f"drop:{turn_id}")]] if turn_id is not None else None


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
SAY_SECONDS = 10 * 60           # how long to insist on a message of the bot's own
ANSWER_SECONDS = 24 * 3600      # and on a part of an answer; it stays in the journal after that
TOO_LARGE = (413, 414)          # what a proxy says of a request; the same again would be refused too
FLOOD_SECONDS = 5               # for a 429 that doesn't say how long
FLOOD_AT_MOST = 24 * 3600
PLAIN_LIMIT = 4096              # UTF-16 units [tg 2.4]
RICH_LIMIT = 32768              # characters [tg 2.1]
RICH_SOURCE = 24000             # characters of Kiro's text in one rich message, before it is made safe
RICH_LINES = 350                # each may become a block, of which there may be 500
DRAFT_LIMIT = 4000
CAPTION_LIMIT = 1024
OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW     # must not wait for a pipe's writer
PHOTO_BYTES = 10 * 1024 * 1024
UPLOAD_BYTES = 50 * 1024 * 1024
LOCAL_UPLOAD_BYTES = 2000 * 1024 * 1024
NO_PREVIEW = types.LinkPreviewOptions(is_disabled=True)
TOPIC_GONE = "This topic is gone, so I answer here:"

Buttons = list[list[tuple[str, str]]]   # rows of (label, data)


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
        self.rich = True                       # until the server turns out not to know rich messages
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

    def pace(self, chat: int) -> Pace:
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
            raise Unreachable(f"HTTP {status} without an answer of the Bot API") from None
        except (apihelper.ApiException, requests.RequestException) as error:    # their texts hold the token
            raise Unreachable(type(error).__name__) from None
        except (urllib3.exceptions.HTTPError, KeyError, TypeError, ValueError) as error:   # an answer in no known form
            raise Unreachable(f"an answer that can't be read ({type(error).__name__})") from None

    def _failure(self, error: apihelper.ApiTelegramException, chat: Optional[int]) -> Exception:
        code, description = error.error_code, error.description
        if code == 429:
            failure = TooManyRequests(retry_after(error.result_json))
            if chat is not None:
                self.pace(chat).close(failure.seconds)
            return failure
        if code >= 500:
            return Unreachable(f"{code} {description}")
        return {401: Unauthorized, 409: Conflict}.get(code, Refused)(code, description)

    def insist(self, method: Callable[..., Any], *args: Any, chat: int, seconds: float = SAY_SECONDS, **kwargs: Any) -> Any:
        """Call until there is a definite answer, for so many seconds; what was lost on the way is sent again.

        Raises Refused, Unreachable, and Closing when the bot is stopping.
        """
        limit, failures = time.monotonic() + seconds, 0
        while True:
            closed = self.pace(chat).closed_for()
            if closed and time.monotonic() + closed > limit:
                raise Unreachable(f"flood control: {closed:.0f} s")
            self.pause(closed)
            try:
                return self.call(method, *args, chat=chat, **kwargs)
            except TooManyRequests as error:
                if time.monotonic() + error.seconds > limit:
                    raise Unreachable(str(error)) from error
            except (Unreachable, Unauthorized) as error:
                delay = retry_delay(failures)
                log.log(logging.DEBUG if failures else logging.WARNING, "%s: %s; trying again", method.__name__, error)
                failures += 1
                if time.monotonic() + delay > limit:
                    raise Unreachable(str(error)) from error
                self.pause(delay)

    def pause(self, seconds: float) -> None:
        """Wait.  Raises Closing when the bot is stopping."""
        if self._closing.wait(seconds) if seconds else self._closing.is_set():
            raise Closing

    def _post(self, method: str, url: str, params: Optional[dict] = None, files: Optional[dict] = None,
              timeout: Any = None, proxies: Any = None) -> requests.Response:
        """Send what telebot has prepared.  Its name is telebot's CUSTOM_REQUEST_SENDER."""
        name = url.rpartition("/")[2]
        body = {key: str(value).lower() if isinstance(value, bool) else value for key, value in (params or {}).items()}
        timeout = UPLOAD_TIMEOUT if files else TIMEOUTS.get(name, TIMEOUT) or timeout
        response = self._session.post(url, data=body, files=files, timeout=timeout)
        response.encoding = "utf-8"            # else requests guesses it, at length
        return response

    def download(self, file_id: str, chat: int) -> Iterator[bytes]:
        """Yield a file's bytes.  Raises as `insist`, and OSError."""
        path = self.insist(apihelper.get_file, file_id, chat=chat, seconds=GET_FILE_SECONDS)["file_path"]
        if self.is_local and os.path.isabs(path):       # a local Bot API server hands out its own files [tg 4]
            with open(path, "rb") as file:
                while chunk := file.read(DOWNLOAD_CHUNK):
                    yield chunk
            return
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


def plain_parts(text: str, cut: Optional[Callable[[str, int], Iterator[str]]] = None) -> list[dict]:
    """Return the text as it is, as parts of allowed size; none for an empty one."""
    pieces = cut(text, PLAIN_LIMIT) if cut else split_text(text, PLAIN_LIMIT, utf16_length)
    return [plain_part(piece) for piece in pieces]


def simple_pieces(text: str, limit: int) -> Iterator[str]:
    """Yield the text in pieces of at most so many UTF-16 units, cut at line ends if possible; without looking into it."""
    at, room = 0, limit // 2
    while at < len(text):
        line = text.rfind("\n", at, at + room) if len(text) - at > room else len(text)
        end = line if line > at else at + room
        if text[at:end].strip():
            yield text[at:end]
        at = end


def markup(buttons: Optional[Buttons]) -> Optional[types.InlineKeyboardMarkup]:
    """Return an inline keyboard, or None for no buttons."""
    if not buttons:
        return None
    rows = [[types.InlineKeyboardButton(whole_characters(label).strip()[:64] or "?", callback_data=data)
             for label, data in row] for row in buttons]
    return types.InlineKeyboardMarkup(rows)


def retry_delay(failures: int) -> float:
    """Return for how many seconds to wait after another failure, when so many came before it in a row."""
    return RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)]


def retry_after(answer: dict) -> float:
    """Return for how many seconds a 429 asks, which need not be said [tg 6]."""
    parameters = answer.get("parameters")
    seconds = parameters.get("retry_after") if isinstance(parameters, dict) else None
    return min(max(seconds, 1), FLOOD_AT_MOST) if isinstance(seconds, (int, float)) else FLOOD_SECONDS


class Topic:
    """A topic of a private chat: what a conversation can do there.  `Terminal` does the same in a terminal."""

    def __init__(self, telegram: Telegram, user_id: int, thread_id: int, rich: bool) -> None:
        self._telegram, self._user_id, self._thread_id, self._rich = telegram, user_id, thread_id, rich
        self._pace = telegram.pace(user_id)
        self._gone = False                     # the topic was deleted, and that was said

    # -- drafts --------------------------------------------------------------------------------------------------------

    def frame_wait(self, last: Optional[float], now: float) -> float:
        """Return 0 when a frame may be sent now, else the seconds until it is worth asking again."""
        return self._pace.frame_wait(last, now)

    def frame(self, draft_id: int, said: str, status: str) -> bool:
        """Show what was said so far, and what goes on, once: the next frame is soon due, and an answer never waits for it.

        Return False when that has to be tried again.
        """
        text = "\n\n".join(filter(None, [tail(said, DRAFT_LIMIT - 300), tail(status, 200)])) or "…"
        try:
            self._telegram.call(apihelper.send_message_draft, self._user_id, draft_id, whole_characters(text),
                                chat=self._user_id, message_thread_id=self._thread_id or None, can_stop=True,
                                keep_on_stop=True)
        except TelegramError as error:
            log.debug("A frame was not shown: %s", error)
            return isinstance(error, Refused)      # the same again would be refused too
        return True

    # -- lasting messages ----------------------------------------------------------------------------------------------

    def parts(self, text: str) -> list[dict]:
        """Cut Kiro's text into parts (see Delivery)."""
        self._gone = False                     # Telegram may have been wrong; it is asked again
        if not (self._rich and self._telegram.rich and has_markdown(text)):
            return plain_parts(text)
        return [{"kind": "rich", "text": piece} for piece in rich_pieces(text)]

    def send(self, part: dict, buttons: Optional[Buttons] = None) -> list[dict]:
        """Send a part of an answer; return other parts when it has to be sent in their form instead."""
        try:
            if part["kind"] == "rich":
                rich = types.InputRichMessage(markdown=rich_safe(part["text"]), skip_entity_detection=True)
                self._post(apihelper.send_rich_message, rich, reply_markup=markup(buttons))
            else:
                self._post_plain(part["text"], buttons)
        except Refused as refusal:
            return self._other_form(part, refusal)
        return []

    def _other_form(self, part: dict, refusal: Refused) -> list[dict]:
        """Return the parts to send in the place of one that was refused."""
        if refusal.code == 403 or "chat not found" in refusal.description:
            log.error("An answer can't be delivered to %s: %s", self._user_id, refusal)
            return []
        log.warning("Telegram refused a %s part: %s", part["kind"], refusal)
        if part["kind"] == "rich":
            if refusal.code == 404 and "chat" not in refusal.description:       # a server that lacks the method
                self._telegram.rich = False
            return plain_parts(part["text"])
        if len(part["text"]) > 1 and "too long" in refusal.description:
            half = split_text(part["text"], max(utf16_length(part["text"]) // 2, 1), utf16_length)
            return [plain_part(piece) for piece in half]
        if part.get("last_word"):
            log.error("Nor can that be said to %s", self._user_id)
            return []
        return [{**plain_part(f"⚠️ Telegram refused a part of the answer: {refusal.description}"), "last_word": True}]

    def _post_plain(self, text: str, buttons: Optional[Buttons] = None, seconds: float = ANSWER_SECONDS) -> Any:
        return self._post(apihelper.send_message, text if text.strip() else "…", seconds=seconds,
                          reply_markup=markup(buttons), link_preview_options=NO_PREVIEW)

    def _post(self, method: Callable[..., Any], content: Any, seconds: float = ANSWER_SECONDS, **kwargs: Any) -> Any:
        """Send into the topic; when it was deleted, to the chat itself, and say so."""
        insist = self._telegram.insist
        if self._thread_id and not self._gone:
            try:
                return insist(method, self._user_id, content, chat=self._user_id, seconds=seconds,
                              message_thread_id=self._thread_id, **kwargs)
            except Refused as refusal:
                if "thread not found" not in refusal.description:
                    raise
            self._gone = True
            insist(apihelper.send_message, self._user_id, TOPIC_GONE, chat=self._user_id, seconds=seconds)
        return insist(method, self._user_id, rewound(content), chat=self._user_id, seconds=seconds, **kwargs)

    def say(self, text: str, buttons: Optional[Buttons] = None) -> None:
        """Send a message of the bot's own.  Raises Refused, Unreachable."""
        pieces = list(split_text(whole_characters(text), PLAIN_LIMIT, utf16_length))
        for n, piece in enumerate(pieces, 1):
            self._post_plain(piece, buttons if n == len(pieces) else None, seconds=SAY_SECONDS)

    def ask(self, text: str, buttons: Buttons) -> int:
        """Send a question once; return its message_id.  Raises Refused, Unreachable, TooManyRequests."""
        if self._pace.closed_for():
            raise TooManyRequests(self._pace.closed_for())
        *before, last = split_text(text, PLAIN_LIMIT - 200, utf16_length)
        for piece in before:                   # of a command so long that one message can't show it
            self._post_plain(piece, seconds=0)
        return self._post_plain(last, buttons, seconds=0)["message_id"]

    def settle(self, message_id: int, text: str) -> None:
        """Replace a message with buttons by its outcome."""
        try:
            self._telegram.insist(apihelper.edit_message_text, tail(text, PLAIN_LIMIT), chat_id=self._user_id,
                                  message_id=message_id, chat=self._user_id, link_preview_options=NO_PREVIEW)
        except Refused as refusal:             # deleted, or already as it should be
            log.debug("A message could not be edited: %s", refusal)

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

    def send_file(self, path: str, caption: str, workspace: str) -> str:
        """Send a file of the workspace; return why not, or nothing."""
        try:
            with open_inside(path, workspace) as file:
                return self._upload(file, caption)
        except FileRefused as refusal:
            return str(refusal)
        except OSError as error:
            return f"it can't be read: {error.strerror or error}"

    def _upload(self, file: IO[bytes], caption: str) -> str:
        """Send as photo if Telegram takes it as such, else as document; return why not, or nothing."""
        size = os.fstat(file.fileno()).st_size
        if not size:
            return "it is empty"
        limit = LOCAL_UPLOAD_BYTES if self._telegram.is_local else UPLOAD_BYTES
        if size > limit:
            return f"it is larger than the {limit >> 20} MB that Telegram takes"
        short, rest = (caption, "") if utf16_length(caption) <= CAPTION_LIMIT else ("", caption)
        is_photo = size <= PHOTO_BYTES and image_type(file.read(16)) in ("image/png", "image/jpeg", "image/webp")
        for send in ([send_photo] if is_photo else []) + [send_document]:
            file.seek(0)
            try:
                self._post(send, file, caption=short or None)
                break
            except Refused as refusal:
                if send is send_document or refusal.code == 403:
                    return f"Telegram refused it: {refusal.description}"
        if rest:
            self.say(rest)
        return ""


def send_photo(token: str, chat_id: int, file: IO[bytes], **kwargs: Any) -> Any:
    """telebot's, with the file's name made safe for its unquoted headers [tg 4]; from the start on each try."""
    name = harmless_name(os.path.basename(file.name))
    return apihelper.send_photo(token, chat_id, (name, rewound(file)), **kwargs)


def send_document(token: str, chat_id: int, file: IO[bytes], **kwargs: Any) -> Any:
    """The same for any file."""
    name = harmless_name(os.path.basename(file.name))
    return apihelper.send_data(token, chat_id, rewound(file), "document", visible_file_name=name, **kwargs)


def rewound(content: Any) -> Any:
    """Return the content; a file is read from its start again."""
    if hasattr(content, "seek"):
        content.seek(0)
    return content


class FileRefused(Exception):
    """A file that Kiro wants to send must not be sent; the text completes "but ..."."""


def open_inside(path: str, workspace: str) -> IO[bytes]:
    """Open a regular file inside the workspace, links resolved.  Raises FileRefused, OSError."""
    try:
        real, root = os.path.realpath(os.path.join(workspace, path)), os.path.realpath(workspace)
        if os.path.commonpath([real, root]) != root:
            raise FileRefused("it is outside of this topic's folder")
        if not os.path.lexists(real):
            raise FileRefused("there is no such file")
        file = open(real, "rb", opener=lambda name, _: os.open(name, OPEN_FLAGS))
    except IsADirectoryError as error:
        raise FileRefused("it is not a regular file") from error
    except ValueError as error:                # a NUL, half a character
        raise FileRefused("that is no file name") from error
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileRefused("it is not a regular file")
        if os.readlink(f"/proc/self/fd/{file.fileno()}") != real:      # a folder on the way became a link meanwhile
            raise FileRefused("it is outside of this topic's folder")
        return file
    except BaseException:
        file.close()
        raise


# ======================================================================================================================
# Markdown: what Kiro writes, made safe and cut to size
# ======================================================================================================================

# `re` holds the interpreter's lock while it searches, so each pattern must be linear on any text: no inner part can be read
# in two ways, and what is looked for in vain stops at a line's end, a bracket or after 2000 characters.
#
#     CODE, FENCE_LINE   where code is: in it nothing is a tag or a link
#     FILE_TAG, CUT_TAG  <send_file>; attributes and caption end at the next < or >
#     MARKDOWN           is there anything to format
#     PROSE              links, code, escapes and signs outside of code, one after the other
#     RULE_CELL          a cell of the line below a table's head
#     SAFE_URL           an address that Telegram takes

MARKERS = r"[ \t]*(?:(?:[-*+]|\d{1,9}[.)]|>)[ \t]+){0,9}"      # of the items and quotes that a code block may begin in
FENCE = MARKERS.join((r"^", r"(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*(?:\n.*?(?:^[ \t>]*(?P=fence)[`~]*[ \t]*$|\Z)|\Z)"))
CODE_SPAN = r"(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).){1,2000}?(?<!`)(?P=ticks)(?!`)"
CODE = re.compile(f"{FENCE}|{CODE_SPAN}", re.M | re.S)
FENCE_LINE = re.compile(MARKERS + r"(`{3,}(?=[^`]*$)|~{3,})")
FILE_TAG = re.compile(r"""<send_file\s+path\s*=\s*(?:"(?P<double>[^"<>\n]*)"|'(?P<single>[^'<>\n]*)'|(?P<bare>[^\s"'<>]+?))"""
                      r"""(?:\s[^<>]*?)?(?:/>|>(?:(?P<caption>(?:(?!<send_file\b).)*?)</send_file>)?)""", re.S)
CUT_TAG = re.compile(r"<send_file\s+path\s*=[^<>]*\Z")
TAG_START, TAG_END = "<send_file", "</send_file>"
MARKDOWN = re.compile(r"""
    ^[ ]{0,3}(?:\#{1,6}\s | [-*+]\s+\S | \d{1,9}[.)]\s+\S | >\s?\S | `{3} | ~{3} | \|.*\|[ \t]*$
        | (?:-{3,}|\*{3,}|_{3,})[ \t]*$)
    | `[^`\n]+` | \*\*\S | (?<!\w)__\S | ~~\S | (?<![\w*])\*[^\s*][^*\n]*\*(?!\w) | (?<!\w)_[^\s_][^_\n]*_(?!\w)
    | \[[^\[\]\n]{0,1000}\]\([^()\n]{1,1000}\)""", re.M | re.X)
PROSE = re.compile(FENCE + "|" + r"""
    (?P<link>(?P<image>!?)\[(?P<label>(?:\\.|`[^`\n]*`|\[[^\[\]\n]*\]|[^\[\]\\`\n])*)\]
        \((?P<target><[^<>\n]*>|[^()\n]*(?:\([^()\n]*\)[^()\n]*)*)\))
    |(?P<code>""" + CODE_SPAN + r""")
    |(?P<definition>^[ ]{0,3}\[(?=(?!\^)[^\]\n]+\]:))
    |(?P<escaped>\\[!-/:-@\[-`{-~])
    |(?P<break><br\s*/?>)
    |<(?P<auto>https?://[^\s<>]+)>
    |(?P<url>https?://[^\s<>"`|\[\]]+)
    |(?P<tag>^[ ]{0,3}\#{1,6}(?=[^\s\#]))
    |(?P<mark>\$|<|==+|\|\|+|!(?=\[|<?https?://))
    """, re.M | re.S | re.X)
RULE_CELL = re.compile(r":?-+:?")
SAFE_URL = re.compile(r"https?://(?:[\w.-]+\.[A-Za-z][\w-]+|\d{1,3}(?:\.\d{1,3}){3})(?::\d{1,5})?(?:[/?#]\S*)?|tg://\S+")


def utf16_length(text: str) -> int:
    """Return the length in UTF-16 units, as Telegram's clients count."""
    return len(text) + sum(c > "\uffff" for c in text) if not text.isascii() else len(text)


def shortened(text: str, limit: int) -> str:
    """Return the text, or its beginning with an ellipsis."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def whole_characters(text: str) -> str:
    """Join surrogate halves, which arrive apart when an emoji lies across two chunks; replace what is left of them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def in_plain_sight(text: str) -> str:
    """Return the text with characters spelled out that show nothing, or turn the direction of what follows."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}"
                   for c in whole_characters(text))


def tail(text: str, limit: int) -> str:
    """Return the end of the text, at most so many UTF-16 units, from the start of a line if possible."""
    if utf16_length(text) <= limit:
        return text
    end = text[-limit + 1:]
    while utf16_length(end) > limit - 1:
        end = end[max(1, (utf16_length(end) - limit) // 2):]
    line = end.find("\n")
    return "…" + (end[line + 1:] if 0 <= line < len(end) // 2 else end)


def code_ranges(text: str) -> list[tuple[int, int]]:
    """Return where code is, in order: fenced blocks, closed or not, and code spans."""
    return [match.span() for match in CODE.finditer(text)] if "`" in text or "~~~" in text else []


def is_inside(at: int, ranges: list[tuple[int, int]]) -> bool:
    """Is the position in one of the ranges, which are in order?"""
    n = bisect.bisect_right(ranges, (at, sys.maxsize))
    return n > 0 and at < ranges[n - 1][1]


def visible_text(text: str, still_coming: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Return the text without its file tags, and the (path, caption) of each; tags inside code are text.

    While the text is still coming, the beginning of a tag at its end is hidden too.
    """
    if "<" not in text:
        return text, []
    code, files, kept, at = code_ranges(text), [], [], 0
    for match in FILE_TAG.finditer(text):
        if is_inside(match.start(), code):
            continue
        kept.append(text[at:match.start()])
        at = match.end()
        if still_coming and not match[0].endswith(("/>", TAG_END)) and TAG_START not in text[at:]:
            at = len(text)                     # its caption is still coming
            break
        path = match["double"] or match["single"] or match["bare"] or ""
        files.append((path.strip(), (match["caption"] or "").strip()))
    rest = text[at:]
    start = tag_beginning(rest) if still_coming else cut_tag(rest)
    if start is not None and not is_inside(at + start, code):
        rest = rest[:start]
    return "".join([*kept, rest]).strip("\n"), files


def tag_beginning(text: str) -> Optional[int]:
    """Return where a tag begins that the next piece may complete."""
    start = text.rfind(TAG_START)
    if start >= 0 and ">" not in text[start:]:
        return start
    start = text.rfind("<", -len(TAG_START))
    return start if start >= 0 and TAG_START.startswith(text[start:]) else None


def cut_tag(text: str) -> Optional[int]:
    """Return where a tag begins that the answer's end has cut off."""
    match = CUT_TAG.search(text)
    return match.start() if match else None


def has_markdown(text: str) -> bool:
    """Is there anything to format?"""
    return bool(MARKDOWN.search(text))


def close_code(text: str) -> str:
    """Return the text with a code block that is open at its end closed."""
    fence = ""
    for line in text.splitlines():
        fence = next_fence(fence, line)
    return f"{text}\n{fence_mark(fence)}" if fence else text


def next_fence(fence: str, line: str) -> str:
    """Return the line that opened the code block we are in after this line, or nothing outside."""
    match = FENCE_LINE.match(line)
    if not match:
        return fence
    if not fence:
        return line
    closes = match[1].startswith(fence_mark(fence)) and not line.strip(" \t>`~")
    return "" if closes else fence


def fence_mark(fence: str) -> str:
    """Return the ``` of a line that opens a code block."""
    return FENCE_LINE.match(fence)[1]


def split_text(text: str, limit: int, size: Callable[[str], int] = len, lines_at_most: int = 10**9) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` by `size`: cut at paragraphs, else lines, else words; a code block is
    closed at a cut and opened again with its language."""
    room = max(limit - 80, limit // 2, 1)      # for the fences at both ends
    piece: list[str] = []                      # lines, with the fence that is open before each
    fences: list[str] = []
    used, fence = 0, ""
    for line in short_lines(text, room, size):
        if piece and (used + size(line) > room or len(piece) >= lines_at_most):
            cut = best_cut(piece, fences)
            yield from fenced(piece[:cut], fences[0], fences[cut] if cut < len(piece) else fence)
            piece, fences = piece[cut:], fences[cut:]
            used = sum(map(size, piece))
        piece.append(line)
        fences.append(fence)
        used += size(line)
        fence = next_fence(fence, line.rstrip("\n"))
    yield from fenced(piece, fences[0] if fences else "", fence)


def best_cut(piece: list[str], fences: list[str]) -> int:
    """Return before which line to cut: after the last blank line of the second half that is in no code block."""
    for n in range(len(piece) - 1, len(piece) // 2, -1):
        if not piece[n - 1].strip() and not fences[n]:
            return n
    return len(piece)


def fenced(lines: list[str], before: str, after: str) -> Iterator[str]:
    """Yield the lines as one piece, its code block opened and closed if it is cut through; nothing for blank ones."""
    body = "".join(lines).rstrip("\n") if before else "".join(lines).strip("\n")
    if not body.strip():
        return
    opening = (before if len(before) <= 40 else fence_mark(before)) + "\n" if before else ""
    if before and after == before and FENCE_LINE.match(body) and not body.strip().strip("`~"):
        return                                 # nothing but the end of the block
    yield opening + body + (f"\n{fence_mark(after)}" if after else "")


def short_lines(text: str, room: int, size: Callable[[str], int]) -> Iterator[str]:
    """Yield the lines with their ends, those that don't fit cut at spaces."""
    for line in text.splitlines(keepends=True):
        while size(line) > room:
            width = room if line.isascii() or size is len else max(room // 2, 1)
            space = line.rfind(" ", width // 2, width)
            cut = space + 1 if space > 0 else width
            yield line[:cut]
            line = line[cut:]
        yield line


def rich_pieces(text: str) -> Iterator[str]:
    """Yield Kiro's Markdown in pieces that are rich messages of allowed size once they are made safe."""
    for piece in split_text(text, RICH_SOURCE, len, RICH_LINES):
        if len(rich_safe(piece)) <= RICH_LIMIT:
            yield piece
        else:
            yield from split_text(piece, RICH_LIMIT // 5, len, RICH_LINES)     # escaping at most multiplies by five


def rich_safe(text: str) -> str:
    """Return Markdown that Telegram neither refuses nor garbles, and that makes it fetch nothing [tg 2.1-2.3]."""
    return hard_breaks(safe_prose(close_code(text)))


def safe_prose(text: str) -> str:
    """Neutralize links and signs outside of code that mean something else to Telegram."""
    return PROSE.sub(_safe_token, text)


def _safe_token(match: re.Match[str]) -> str:
    """Return what stands for one match of PROSE; code and escapes stay as they are."""
    if match["link"]:
        return _safe_link(match["label"], match["target"])
    if match["definition"]:
        return "\\["
    if match["break"]:
        return " "
    if match["auto"]:
        return _safe_link("", match["auto"])
    if match["url"]:
        url = match["url"].rstrip(".,;:!?'*_" if "(" in match["url"] else ".,;:!?'*_)")     # what ends the sentence
        return _safe_link("", url) + match["url"][len(url):]
    if match["tag"]:
        return match["tag"].replace("#", "\\#", 1)
    if match["mark"]:
        return _safe_mark(match)
    return match[0]


def _safe_mark(match: re.Match[str]) -> str:
    mark = match["mark"]
    if mark == "<":
        return "&lt;"
    line = match.string[match.string.rfind("\n", 0, match.start()) + 1:match.start()]
    if mark[0] == "|" and line.lstrip().startswith("|"):
        return " ".join(mark)                  # empty cells
    return "".join("\\" + sign for sign in mark)


def _safe_link(label: str, target: str) -> str:
    """Return a link that Telegram takes, or else label and target as text: a relative path would refuse it all."""
    target = target.strip().strip("<>").split(' "')[0].strip()
    label = safe_prose(label)
    if SAFE_URL.fullmatch(target):
        target = target.replace("$", "%24")
        return f"[{label or safe_label(target)}]({target})"
    code = f"`{target.replace('`', '')}`" if target.strip("`") else ""
    if not label.strip() or label.strip("`* ") == target:
        return code
    return f"{label} ({code})" if code else label


def safe_label(url: str) -> str:
    """Return an address as text that is not taken for Markdown."""
    return re.sub(r"([\\`*_\[\]$<>=|~])", r"\\\1", url)


def is_table_rule(line: str) -> bool:
    """Is it the line below a table's head?"""
    return all(RULE_CELL.fullmatch(cell.strip()) for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))


def hard_breaks(text: str) -> str:
    """Keep single line ends, which Markdown would fold into one line, by two spaces before them."""
    lines, fence, in_table = text.split("\n"), "", False
    for n, line in enumerate(lines[:-1]):
        before, fence = fence, next_fence(fence, line)
        in_table = "|" in line and (in_table or is_table_rule(lines[n + 1]))
        if not (before or fence or in_table) and line.strip() and lines[n + 1].strip():
            lines[n] = line.rstrip() + "  "
    return "\n".join(lines)


# ======================================================================================================================
# Running: start, stop, the console, the check
# ======================================================================================================================

START_SECONDS = 5 * 60          # how long to wait for Telegram at the start
PURGE_SECONDS = 6 * 3600
HEARTBEAT_SECONDS = 0.5         # between two signs of life of the main thread
FROZEN_SECONDS = 2              # of processor time without one: something holds the interpreter's lock, and stops everybody
CHECK_SECONDS = 3
VERSION_SECONDS = 10
CONSOLE_USER = CONSOLE_THREAD = 0
PRINT_SECONDS = 0.05            # between two pieces of an answer in the console


class StartError(Exception):
    """The bot can't run; the text is one line that says why."""


def lock_folder(folder: Path) -> None:
    """Make sure that this is the folder's only bot, until the program ends.  Raises StartError."""
    descriptor = os.open(folder, os.O_RDONLY)      # never closed: it holds the lock
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StartError(f"Another bot is running in {folder}") from error


def make_folder(settings: Settings) -> None:
    """Make the folder for the workspaces, for its owner only.  Raises SettingsError."""
    try:
        settings.workspaces.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(settings.workspaces, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
    except OSError as error:
        raise SettingsError(f"WORKSPACE_BASE_PATH: {settings.workspaces} can't be used: {error.strerror}") from error


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
    try:
        process = subprocess.Popen([program, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, start_new_session=True, env=child_environment(settings, "version"))
        said, _ = process.communicate(timeout=VERSION_SECONDS)
    except OSError as error:
        raise StartError(f"KIRO_COMMAND: {program} can't be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
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


def describe_topics(me: dict) -> str:
    """Say whether the bot's private chats have topics, and how to get them."""
    if me.get("has_topics_enabled"):
        return "topics are on"
    return "topics are off (switch them on: @BotFather, Bot Settings, Threaded Mode); until then there is one conversation"


def describe_allowed(settings: Settings) -> str:
    """Say who may use the bot."""
    if not settings.allowed:
        return "nobody yet (ALLOWED_TELEGRAM_IDS is empty): write to the bot, it tells you your id"
    return ", ".join(map(str, sorted(settings.allowed)))


def serve(settings: Settings) -> int:
    """Run the bot until it is told to stop; return the exit status."""
    lock_folder(settings.folder)
    make_folder(settings)
    make_private(settings.folder / ".env", settings.folder / DATABASE)
    with open_store(settings.folder / DATABASE) as store:
        bot = Bot(settings, store)
        os.set_blocking(bot.bell_handle, False)
        signal.set_wakeup_fd(bot.bell_handle)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)     # the bell rings
        threading.Thread(target=run, args=(bot,), name="poll", daemon=True).start()
        faulthandler.register(signal.SIGPROF, chain=True)      # says where it hung, then the signal's default: the end
        purge_at = time.monotonic() + PURGE_SECONDS
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
    settings = bot.settings
    try:
        log.info("Kiro: %s", kiro_version(settings))
    except StartError as error:      # it may be installed while the bot runs
        log.error("%s", error)
    log.info("pyTelegramBotAPI: %s", telebot_version)
    me = get_me(bot.telegram, START_SECONDS)
    log.info("Bot: @%s, %s", me.get("username"), describe_topics(me))
    log.info("Allowed: %s", describe_allowed(settings))
    log.info("Folder: %s", settings.workspaces)
    purge(bot.store)
    log.info("Database: %s, %d sessions", settings.folder / DATABASE, bot.store.count_sessions())
    bot.errand("menu", bot.telegram.call, apihelper.set_my_commands, [types.BotCommand(*item) for item in COMMANDS.items()])


def purge(store: SessionStore) -> None:
    """Forget old messages."""
    try:
        store.purge()
    except StoreError as error:
        log.error("Old messages can't be purged: %s", error)


def open_store(path: Path, kind: type[SessionStore] = SessionStore) -> SessionStore:
    """Return the database.  Raises StartError."""
    try:
        return kind(str(path))
    except StoreError as error:
        raise StartError(f"The database {path} can't be used: {error}") from error


# -- the console -------------------------------------------------------------------------------------------------------

class Terminal:
    """A terminal in the place of a `Topic`: what Kiro says is printed as it comes."""

    def __init__(self) -> None:
        self._shown = ""                       # of the present answer
        self.question: Optional[Buttons] = None     # the buttons of an open permission request

    def frame_wait(self, last: Optional[float], now: float) -> float:
        return max(0.0, last + PRINT_SECONDS - now) if last else 0

    def frame(self, draft_id: int, said: str, status: str) -> bool:
        if said.startswith(self._shown):
            self._print(said[len(self._shown):])
            self._shown = said
        return True

    def parts(self, text: str) -> list[dict]:
        return [plain_part(text)]

    def send(self, part: dict, buttons: Optional[Buttons] = None) -> list[dict]:
        text = part["text"]
        self._print((text[len(self._shown):] if text.startswith(self._shown) else text) + "\n")
        self._shown = ""
        return []

    def send_file(self, path: str, caption: str, workspace: str) -> str:
        try:
            with open_inside(path, workspace) as file:
                print(f"[file: {file.name}] {caption}", flush=True)
        except FileRefused as refusal:
            return str(refusal)
        except OSError as error:
            return f"it can't be read: {error.strerror or error}"
        return ""

    def say(self, text: str, buttons: Optional[Buttons] = None) -> None:
        print(text, flush=True)

    def ask(self, text: str, buttons: Buttons) -> int:
        print("\n" + text)
        for n, [(label, _)] in enumerate(buttons, 1):
            print(f"  {n}. {label}")
        print(f"Choose 1-{len(buttons)}: ", end="", flush=True)
        self.question = buttons
        return 1

    def settle(self, message_id: int, text: str) -> None:
        self.question = None
        print(text.splitlines()[-1], flush=True)

    def react(self, message_id: int, emoji: str) -> None:
        pass

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Console:
    """Talks to Kiro in this terminal, as user 0 in thread 0.  It may run beside a bot: its messages are journaled in
    memory, and it touches nobody's locks and processes but its own."""

    def __init__(self, bot: Bot) -> None:
        self._bot = bot
        self._terminal = Terminal()
        self._conversation = Conversation(bot, CONSOLE_USER, CONSOLE_THREAD, self._terminal)
        self._count = 0

    def run(self) -> None:
        """Take each line as one message, until the input's end."""
        if sys.stdin.isatty():
            print("Talk to Kiro. /help tells the commands; Ctrl-C stops the turn, Ctrl-D leaves.")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if line.strip():
                self._handle(line.strip())

    def _handle(self, line: str) -> None:
        """Do as `Commands.route` does, but print, and return only when the answer is there."""
        self._count += 1
        message = types.Message.de_json({
            "message_id": self._count, "date": 0, "text": line, "chat": {"id": CONSOLE_USER, "type": "private"}})
        incoming = Incoming(self._count, message)
        if incoming.command in ("start", "help"):
            print(HELP)
        elif incoming.command == "status":
            print(self._conversation.status())
        elif incoming.command == "model" and self._conversation.agent.model_names():
            print(self._conversation.agent.answer_model(incoming.argument)[0])
        elif incoming.command == "stop":
            print("Nothing is running.")
        else:
            row = InboxMessage(self._count, CONSOLE_USER, CONSOLE_THREAD, self._count, "")
            self._bot.store.receive([row])
            self._conversation.add(incoming)
            self._attend()
        if incoming.command == "model" and not incoming.argument:
            print(*(f"  {name}" for name in self._conversation.agent.model_names()), sep="\n")

    def _attend(self) -> None:
        """Wait for the answer; ask what Kiro asks; Ctrl-C stops the turn."""
        while self._conversation.turn is not None:
            try:
                time.sleep(0.01)
                if self._terminal.question:
                    self._decide(self._terminal.question)
            except KeyboardInterrupt:
                self._conversation.stop()

    def _decide(self, buttons: Buttons) -> None:
        """Read the number of a button, and press it."""
        self._terminal.question = None
        try:
            answer = input()
        except EOFError:
            answer = ""
        index = int(answer) - 1 if answer.strip().isdigit() else -1
        if not 0 <= index < len(buttons):
            print("That is none of them; the turn is stopped.")
            self._conversation.stop()
            return
        _, token, number = buttons[index][0][1].split(":")
        self._bot.questions.decide(CONSOLE_USER, token, int(number), 1)


class ConsoleStore(SessionStore):
    """Sessions of the real database, the journal in memory: a bot beside the console must not find its messages."""

    def __init__(self, path: str) -> None:
        super().__init__(":memory:")
        self._sessions = SessionStore(path)
        for name in ("get_session", "upsert_session", "set_model", "get_model", "delete_session", "get_facts", "set_facts"):
            setattr(self, name, getattr(self._sessions, name))

    def close(self) -> None:
        self._sessions.close()
        super().close()


def console(settings: Settings) -> int:
    """Run the console; return the exit status."""
    logging.getLogger().setLevel(max(logging.WARNING, logging.getLogger().level))
    make_folder(settings)
    make_private(settings.folder / ".env", settings.folder / DATABASE)
    store = open_store(settings.folder / DATABASE, ConsoleStore)
    with store:
        bot = Bot(settings, store)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            Console(bot).run()
        finally:
            bot.shut_down()
    return 0


# -- the check ---------------------------------------------------------------------------------------------------------

def check(settings: Settings) -> int:
    """Try everything once and print what was found; return 0 when all is well, else 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # as Ctrl-C: nothing is left behind
    closing = threading.Event()
    telegram = Telegram(settings, closing)
    steps = [("Folder", lambda: check_folder(settings)), ("Database", lambda: check_database(settings)),
             ("Telegram", lambda: check_telegram(telegram)), ("Allowed", lambda: describe_allowed(settings)),
             ("Kiro", lambda: kiro_version(settings)), ("Handshake", lambda: handshake(settings)),
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


def check_folder(settings: Settings) -> str:
    make_folder(settings)
    make_private(settings.folder / ".env", settings.folder / DATABASE)
    return str(settings.workspaces)


def check_database(settings: Settings) -> str:
    path = settings.folder / DATABASE
    if not path.exists():
        return f"{path} will be made"
    with open_store(path) as store:
        return f"{path}, {store.count_sessions()} sessions"


def check_telegram(telegram: Telegram) -> str:
    me = get_me(telegram, CHECK_SECONDS)
    return f"@{me.get('username')}, {describe_topics(me)}"


def handshake(settings: Settings) -> str:
    """Start Kiro in a temporary folder, make a session, and say what it offers.  Raises KiroFailure, SettingsError."""
    make_folder(settings)      # inside it: a sandbox may hide /tmp and everything else
    with tempfile.TemporaryDirectory(prefix=".check-", dir=settings.workspaces) as folder, SessionStore(":memory:") as store:
        bot = Bot(settings._replace(workspaces=Path(folder), silence_seconds=min(settings.silence_seconds, 60)), store)
        conversation = Conversation(bot, CONSOLE_USER, CONSOLE_THREAD, Terminal())
        try:
            kiro = conversation.agent.ready()
            agent = (kiro.agent or {}).get("agentInfo") or {}
            return (f"{agent.get('name', 'the agent')} {agent.get('version', '')} made a session; models: "
                    f"{', '.join(conversation.agent.model_names()) or 'none reported'}")
        except KiroFailure as failure:
            raise KiroFailure(f"{failure}{conversation.agent.advice(failure)}") from failure
        finally:
            bot.shut_down()


def check_locks(settings: Settings) -> str:
    """Name the sessions of this bot that a dead process has locked; the bot removes such a lock when it meets it."""
    path, stale = settings.folder / DATABASE, []
    if not path.exists():
        return "none"
    with open_store(path) as store:
        for session_id in store.session_ids():
            pid = lock_pid(session_id)
            if pid is not None and not (is_running(pid) and holds_lock(pid, session_id, settings)):
                stale.append(f"{session_id} (process {pid})")
    return f"stale, removed at the next message: {', '.join(stale)}" if stale else "none stale"


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
    options = parser.parse_args(arguments)
    os.umask(0o077)
    folder = Path.cwd()
    try:
        settings = load_settings(folder, need_token=not options.console)
        set_up_logging(settings)
        return check(settings) if options.check else console(settings) if options.console else serve(settings)
    except (SettingsError, StartError) as error:
        print(f"bot.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


def load_settings(folder: Path, need_token: bool) -> Settings:
    """Read `.env` and the environment, which wins; take the token out of it, so that no child inherits it.

    Raises SettingsError.
    """
    try:
        if (folder / ".env").exists():
            check_syntax(folder / ".env")
        load_dotenv(folder / ".env")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    settings = read_settings(dict(os.environ), folder, need_token)
    os.environ.pop("BOT_TOKEN", None)
    return settings


def check_syntax(path: Path) -> None:
    """Make sure that dotenv understands each line, where it would only warn.

    Raises SettingsError, OSError, UnicodeDecodeError.
    """
    with open(path, encoding="utf-8") as file:
        for binding in parse_stream(file):
            if binding.error:
                name = binding.original.string.strip().partition("=")[0]
                raise SettingsError(f".env, line {binding.original.line}: {name} can't be read (is a quote missing?)")


def start(arguments: list[str]) -> None:
    """Run the program and end it."""
    try:
        status = main(arguments)
    except KeyboardInterrupt:    # the check, or the console while it ends
        status = 130
    sys.stdout.flush()
    logging.shutdown()
    os._exit(status)     # not sys.exit: threads that still wait for the network must not keep the program
