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
Kiro and sends drafts and answers; while a file is downloaded, an aside thread does that for it.  keeper: one for each Kiro
process; it reads, writes, sees the process and what that leaves behind to their end, and gives its place back.

Locks, each held for a moment and never across a network call or a turn: `Conversation.lock` (what waits, the turn and its
phase, whether there is a thread), `Questions._lock`, `Places._lock`, `Pace._lock`, `Bot._lock` (the table of conversations),
`Bot.spawning` (no process starts unseen while the bot closes), and the database's own.  What is sent to Kiro is handed to its
keeper by adding to a buffer, which is one step.  Read without a lock, each a single value that is replaced as a whole:
`Agent.models` and `Agent.known` (for /status), `Kiro.turn_open`, `Telegram.rich`, `Draft.stopped`, `Delivery.sending`; and
what Kiro has said so far, when the bot stops.

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
import subprocess
import tempfile
import termios
import threading
import time
import unicodedata
from collections import deque
from enum import Enum
from pathlib import Path
from typing import IO, Any, Callable, Iterable, Iterator, NamedTuple, Optional

import requests
import telebot
import urllib3
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from telebot import apihelper, types, util
from telebot.version import __version__ as telebot_version

from sessions import InboxMessage, SessionFacts, SessionRecord, SessionStore, StoreError, UnfinishedTurn

log = logging.getLogger("bot")

DATABASE = "tg-acp.db"


# ======================================================================================================================
# Settings
# ======================================================================================================================

TELEGRAM_API = "https://api.telegram.org"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
DEFAULTS = {"BOT_TOKEN": "",
            "ALLOWED_TELEGRAM_IDS": "",
            "KIRO_COMMAND": "kiro-cli acp --agent-engine v2",
            "WORKSPACE_BASE_PATH": "./workspaces/",
            "MAX_PROCESSES": "3",
            "WARM_SECONDS": "300",
            "TOOL_APPROVAL": "ask",
            "SILENCE_SECONDS": "600",
            "START_SECONDS": "60",
            "RICH_MESSAGES": "on",
            "TRANSCRIBE_COMMAND": "",
            "LOG_LEVEL": "INFO",
            "TELEGRAM_API_URL": TELEGRAM_API}
ALIKE = 0.85                    # of two names, by difflib; TELEGRAM_API_ID is less like TELEGRAM_API_URL


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
    return Settings(
        token=_token(values["BOT_TOKEN"], need_token),
        allowed=_user_ids(values["ALLOWED_TELEGRAM_IDS"]),
        kiro_command=_command(values["KIRO_COMMAND"], folder),
        workspaces=_folder(values, "WORKSPACE_BASE_PATH", folder),
        max_processes=int(_number(values, "MAX_PROCESSES", at_least=1, whole=True)),
        warm_seconds=_number(values, "WARM_SECONDS", at_least=0),
        ask_permission=_choice(values, "TOOL_APPROVAL", ("ask", "allow")) == "ask",
        silence_seconds=_number(values, "SILENCE_SECONDS", at_least=1),
        start_seconds=_number(values, "START_SECONDS", at_least=1),
        rich_messages=_choice(values, "RICH_MESSAGES", ("on", "off")) == "on",
        transcribe_command=_words("TRANSCRIBE_COMMAND", values["TRANSCRIBE_COMMAND"], folder),
        log_level=_choice(values, "LOG_LEVEL", LOG_LEVELS),
        api_url=_url(values, "TELEGRAM_API_URL"),
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
    names = re.findall(r"[^\s,]+", text)
    for name in names:
        if not re.fullmatch(r"[1-9]\d{0,18}", name, re.ASCII):
            raise SettingsError(f"ALLOWED_TELEGRAM_IDS: {name!r} is no numeric user id (write to the bot to learn yours)")
    return frozenset(map(int, names))


def _command(text: str, folder: Path) -> list[str]:
    words = _words("KIRO_COMMAND", text, folder)
    if not words:
        raise SettingsError("KIRO_COMMAND is empty")
    return words


def _words(name: str, text: str, folder: Path) -> list[str]:
    try:
        return [_absolute(word, folder, is_program=n == 0) for n, word in enumerate(shlex.split(text))]
    except ValueError as error:
        raise SettingsError(f"{name} can't be read as a command line: {error}") from error


def _absolute(word: str, folder: Path, is_program: bool) -> str:
    """Return a relative path that exists as absolute, since Kiro runs in another folder; anything else as it is."""
    if word.startswith(("-", "/")) or (is_program and "/" not in word):
        return word
    for base in (folder, Path(__file__).resolve().parent):
        path = str(base / word)
        if os.path.isfile(path) or ("/" in word and os.path.exists(path)):
            return path
    return word


def _folder(values: dict[str, str], name: str, base: Path) -> Path:
    try:
        return (base / Path(values[name]).expanduser()).resolve()
    except RuntimeError as error:          # ~nobody
        raise SettingsError(f"{name}: {values[name]!r}: {error}") from error


def _number(values: dict[str, str], name: str, at_least: float, whole: bool = False) -> float:
    try:
        number = float(values[name])
    except ValueError:
        number = math.nan
    if not (at_least <= number < math.inf) or (whole and number != int(number)):
        kind = "whole number" if whole else "number"
        raise SettingsError(f"{name}: {values[name]!r} is not a {kind} of at least {at_least:g}")
    return number


def _choice(values: dict[str, str], name: str, choices: tuple[str, ...]) -> str:
    for choice in choices:
        if values[name].lower() == choice.lower():
            return choice
    raise SettingsError(f"{name}: {values[name]!r} is none of {', '.join(choices)}")


def _url(values: dict[str, str], name: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", values[name]):
        raise SettingsError(f"{name}: {values[name]!r} is no http or https address")
    return values[name].rstrip("/")


class Redacted(logging.Formatter):
    """Log lines in which the bot's token can't appear, whatever brought it there [tg 5.6]."""

    def __init__(self, token: str) -> None:
        journal = os.environ.get("JOURNAL_STREAM")     # which notes the time by itself
        in_journal = journal and journal == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
        super().__init__(("" if in_journal else "%(asctime)s ") + "%(levelname)s %(message)s")
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

MESSAGE_FIELDS = ["message_id", "from", "chat", "date", "message_thread_id", "is_topic_message", "media_group_id", "text"]
FIELDS = {"message": MESSAGE_FIELDS,
          "edited_message": MESSAGE_FIELDS,
          "callback_query": ["id", "from", "chat_instance", "message", "data"],
          "stopped_message_generation": ["chat", "message_thread_id", "draft_id"]}
NESTED = ["reply_to_message", "external_reply", "forward_origin"]
ALLOWED_UPDATES = list(FIELDS)  # sticky, so always given
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
        self._strangers: set[int] = set()
        self._env = b""                        # what `.env` says
        self._batch: list[Accepted] = []
        self._update: dict[str, Any] = {}      # the one in hand
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
            asked_at = time.monotonic()
            try:
                for row in self._bot.store.take_told():        # by bot.py --tell, on this machine
                    self._bot.commands.route(Incoming.from_journal(row))
                updates = self._fetch(offset)
                self._look_at_env()
                offset = self._take(updates) or offset
                if failures:
                    log.info("Polling again")
                failures = conflicts = 0
                pause = 0 if updates else asked_at + EMPTY_SECONDS - time.monotonic()
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
            self._bot.closing.wait(max(0, pause))

    def _fetch(self, offset: Optional[int]) -> list[dict]:
        updates = self._bot.telegram.call(apihelper.get_updates, offset=offset, timeout=10,
                                          long_polling_timeout=POLL_SECONDS, allowed_updates=ALLOWED_UPDATES)
        return updates if isinstance(updates, list) else []

    def _look_at_env(self) -> None:
        """Take over who may use the bot, when `.env` has changed."""
        settings = self._bot.settings
        path = settings.folder / ".env"
        try:
            content = path.exists() and path.read_bytes()
            if content in (False, self._env):
                return
            self._env = content
            allowed = load_settings(settings.folder, need_token=False).allowed
        except (OSError, SettingsError) as error:
            return log.error("Who may use the bot stays as it was: %s", error)
        if allowed != settings.allowed:
            self._bot.settings = settings._replace(allowed=allowed)
            log.info("Allowed from now on: %s", describe_allowed(self._bot.settings))

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
        followed = set()                       # topics in which something comes later in the batch
        for incoming in (a.incoming for a in reversed(batch) if a.incoming):
            incoming.followed = incoming.key in followed
            followed.add(incoming.key)
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
            sender, chat = (update.get("callback_query") or message)["from"]["id"], message["chat"]
            if sender in self._bot.settings.allowed and chat["id"] == sender and chat["type"] == "private":
                key = sender, thread_of(message)
                self._bot.errand(key, self._bot.conversation(*key).tell, UNREADABLE)
        except (KeyError, TypeError, AttributeError):
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
        self._bot.errand("strangers", self._tell_stranger, stranger, thread_of(self._update["message"]))

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
        if self._update["message"].keys() & util.content_type_service:
            return
        incoming = Incoming.read(self._update["update_id"], self._update)
        self._batch.append(Accepted("message", lambda: self._bot.commands.route(incoming), self._row(incoming), incoming))

    def _on_edit(self, message: types.Message) -> None:
        if not self._lets_in(message.from_user, message.chat) or "location" in self._update["edited_message"]:     # it moves
            return
        incoming = Incoming.read(self._update["update_id"], self._update)
        row = self._row(incoming)
        body, state = self._bot.store.find_message(row.user_id, row.message_id)
        if body and contents(message_in(json.loads(body))) == contents(incoming.message):
            return                             # it got a reaction, or a link preview [tg 7]
        row = None if incoming.command in OWN else row     # as `Commands.edit` does
        self._batch.append(Accepted("edit", lambda: self._bot.commands.edit(incoming, state), row, incoming))

    def _on_press(self, press: types.CallbackQuery) -> None:
        message, sender = press.message, press.from_user
        if message:
            message.json = self._update["callback_query"]["message"]
        if self._lets_in(sender, message.chat) if message else sender.id in self._bot.settings.allowed:
            self._batch.append(Accepted("press", lambda: self._bot.commands.press(press)))

    def _on_stop(self, stop: types.MessageGenerationStopped) -> None:
        if self._lets_in(stop.chat, stop.chat):       # it has no sender: the chat decides [tg 1.3]
            self._batch.append(Accepted("press", lambda: self._bot.commands.stop_draft(stop.chat.id, stop.draft_id)))

    def _row(self, incoming: Incoming) -> InboxMessage:
        """Return the message's row of the journal.  Raises ValueError for ids that are none."""
        ids = incoming.update_id, *incoming.key, incoming.message["message_id"]
        if not all(isinstance(number, int) and abs(number) < 2**63 for number in ids):
            raise ValueError(f"ids {ids}")
        return InboxMessage(*ids, json.dumps(self._update))


def plain(part: dict) -> dict:
    """Return an update, or a part of one, with only the fields that telebot is asked for: it stumbles over what it does not
    know, in quotes and forwards too [tg 1.3, 7]."""
    return {name: plain({field: value[field] for field in FIELDS[name] if field in value}) if name in FIELDS else value
            for name, value in part.items()}


def message_in(update: dict) -> Optional[dict]:
    """Return the message of an update, or the one whose button was pressed."""
    return update.get("message") or update.get("edited_message") or update.get("callback_query", {}).get("message")


class Accepted(NamedTuple):
    """An update that the gate let in."""
    kind: str                              # "message", "edit" or "press"
    action: Callable[[], None]             # hands it over; run on the poll thread, so it must not wait
    row: Optional[InboxMessage] = None     # for the journal
    incoming: Optional[Incoming] = None    # a message or an edited one


class Incoming:
    """A message that a conversation is to handle."""

    def __init__(self, update_id: int, message: dict) -> None:
        self.update_id = update_id
        self.message = message                 # as Telegram sent it
        self.arrived = time.monotonic()
        self.files: Optional[list[Attachment]] = None      # once they are downloaded
        self.followed = False                  # by another that came with it
        self.command, self.argument = command_of(message)

    @classmethod
    def read(cls, update_id: int, update: dict) -> Incoming:
        """Return the message of an update; without what it quotes, if that can't be read.  Raises anything when its own words
        can't."""
        message = message_in(update)
        try:
            full_text(message), files_of(message)
        except Exception:   # something new
            message = {name: value for name, value in message.items() if name not in NESTED} | {"quote": UNREAD}
            full_text(message), files_of(message)
        return cls(update_id, message)

    @classmethod
    def from_journal(cls, row: InboxMessage) -> Incoming:
        """Return the message of a journal row.  Raises as `read`."""
        return cls.read(row.update_id, json.loads(row.body))

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
    thread_id = message.get("message_thread_id") if message.get("is_topic_message") else 0
    return thread_id if isinstance(thread_id, int) else 0


def command_of(message: dict) -> tuple[str, str]:
    """Return ("new", "the rest") for "/new the rest", two empty strings for what is no command."""
    text = "" if "forward_origin" in message else message.get("text", "")     # what somebody else wrote commands nothing
    match = re.match(r"/([A-Za-z0-9_-]+)(?:@\w+)?(?:\s+(.*))?$", text, re.S)
    return (match[1].lower(), (match[2] or "").strip()) if match else ("", "")


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
        """Take up what a former run left: its processes, unfinished turns, and the messages that still wait.

        The processes first and at once: while one works, its turn must not be offered again.  That takes a listing of /proc,
        and seconds only if some process holds out against TERM.
        """
        end_orphans(self.settings.folder)
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
        for deadline, grace in ((1.0, 0.4), (1.8, 0)):
            while (self.processes or self._sending()) and time.monotonic() - began < deadline:
                time.sleep(0.01)
            end_processes(lambda: [pid for kiro in list(self.processes) for pid in kiro.family()], grace)
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
UNSUPPORTED = "I can't pass on this kind of message. Send it as text or as a file."
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
            theirs = conversation.agent.commands
            self._bot.errand(incoming.key, self._reply, incoming, "\n".join([HELP, *["\nKiro's own:"] * bool(theirs), *theirs]))
        elif incoming.command == "status":
            self._bot.errand(incoming.key, self._status, incoming)
        elif incoming.command == "model" and conversation.agent.model_names():
            self._bot.errand(incoming.key, self._model, incoming)
        elif any(contents(incoming.message)):
            conversation.add(incoming)
        else:
            self._bot.errand(incoming.key, self._reply, incoming, UNSUPPORTED)

    def edit(self, incoming: Incoming, state: str) -> None:
        """A message was edited: as long as it waits, or is `offered`, it goes as edited."""
        conversation, message = self._bot.conversation(*incoming.key), incoming.message
        if incoming.command == "stop" and message.get("edit_date", math.inf) - message["date"] <= EDIT_SECONDS:
            conversation.stop()
        if incoming.command in OWN:                # no better version of a message; it stays as it was
            return
        if not conversation.edit(incoming) and state not in ("", "offered"):
            self._bot.errand(incoming.key, conversation.tell,
                             "Your edit came too late: the message was taken as it was. "
                             "Send the correction as a new message.")

    def stop_draft(self, user_id: int, draft_id: int) -> None:
        """The Stop button of a draft; only the running turn's own draft counts."""
        for conversation in self._bot.conversations():
            if conversation.key[0] == user_id:
                conversation.stop(draft_id)

    def press(self, press: types.CallbackQuery) -> None:
        """A button: data that this bot didn't make does nothing."""
        data = press.data if press.data and press.message else ""
        if match := re.fullmatch(r"ask:([0-9a-f]{16}):(\d{1,2})", data):
            choice = self._decide(press, match[1], int(match[2]))      # at once: Kiro waits
            self._bot.errand(press.id, self._decided, press, match[1], choice)
        elif match := re.fullmatch(r"(again|drop):(\d{1,18})", data):
            self._bot.errand(match[2], self._again if match[1] == "again" else self._drop, press, int(match[2]))
        elif match := re.fullmatch(r"model:(\d{1,18}):([0-9a-f]{16})", data):
            self._bot.errand((press.from_user.id, int(match[1])), self._model_pressed, press, int(match[1]), match[2])
        else:
            self._bot.errand(press.id, self._toast, press, OVER)

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
        before = press.message.json.get("text") if keep else None
        self._bot.chat(press.from_user.id, 0).settle(press.message.message_id, f"{before}\n\n{text}" if before else text)


def carries(message: types.Message, data: Optional[str]) -> bool:
    """Does the message have a button with this data?  Not when somebody made the press up."""
    keyboard = message.json.get("reply_markup", {}).get("inline_keyboard", [])
    return any(button.get("callback_data") == data for row in keyboard for button in row)


def model_key(name: str) -> str:
    """Return 16 hex digits for a model's id, which may not fit into a button's 64 bytes [acp 11]."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


# ======================================================================================================================
# Conversation: what waits, what comes next
# ======================================================================================================================

JOIN_SECONDS = 1.0              # how long to wait for the rest of an album or of a pasted text
REST_SECONDS = 0.3              # and for what comes with a forward or a file
SPLIT_TEXT_LENGTH = 4000        # clients split a pasted text at 4096
JOURNAL_TRIES = 240
JOURNAL_RETRY_SECONDS = 15
LOOK_SECONDS = 60               # the longest sleep of a conversation's thread
FROZEN_GAP = 5                  # seconds late: this program did not run, and Kiro's silence counts anew
EXCERPT_LENGTH = 300            # characters of what was asked, on a card
SEEN = "👀"
STATUS_WORDS, STATUS_WAITING = 40, 8     # characters of a waiting message, and how many, that /status shows


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
        if first_to_wait and incoming.message["message_id"]:
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
            name = "conversation {}/{}".format(*self.key)
            threading.Thread(target=self._run, name=name, daemon=True).start()
            self._running = True

    def edit(self, incoming: Incoming) -> bool:
        """Replace a waiting message by its edited version; return False when it does not wait."""
        message = incoming.message
        with self.lock:
            for n, old in enumerate(self.waiting):
                if old.message["message_id"] == message["message_id"]:
                    incoming.update_id, incoming.arrived = old.update_id, old.arrived
                    incoming.files = old.files if files_of(old.message) == files_of(message) else None
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
        """Return what /status says: what concerns people first."""
        record, known = self.store.get_session(*self.key), self.agent.known
        with self.lock:
            turn, waiting = self.turn, [one_line(words(incoming.message), STATUS_WORDS) for incoming in self.waiting]
        lines = [turn.status(), *plan_lines(turn.answer.plan)] if turn else ["Nothing is running."]
        lines += [f"Waiting: {text}" for text in waiting[:STATUS_WAITING]]
        if len(waiting) > STATUS_WAITING:
            lines.append(f"and {len(waiting) - STATUS_WAITING} more")
        lines.append(f"Model: {self.agent.model()}")
        if known.context is not None:
            lines.append(f"Context used: {known.context:.0f} %")
        if known.credits is not None:
            lines.append(f"Credits: {known.credits:.4g} in the last turn, {known.spent:.4g} in this session")
        return "\n".join([*lines, f"Session: {record.session_id if record else 'none yet'}",
                          f"Folder: {record.workspace_path if record else self.agent.default_workspace()}"])

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
            if incoming.command:
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
        self.agent.known.charge(turn.answer.credits)
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
                asked.append(words(message) or "(a file)")
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
            rest = words(incoming.message).split(maxsplit=1)[1]
            incoming.command, incoming.message = "", {**incoming.message, "text": rest, "entities": []}
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
PLAN_WIDTH, PLAN_LENGTH = 80, 12         # characters of an entry, entries that /status shows
PLAN_SIGNS = {"completed": "☑", "in_progress": "▸"}
TIME_SHOWN_AFTER = 10           # seconds
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
            outlived_login = used is warm and isinstance(failure, KiroRefusal) and is_login(failure)
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
        """Wait a moment for the rest of an album or the like, unless something else has come."""
        while True:
            with self.conversation.lock:
                last, newest = self.conversation.batch()[-1], self.conversation.waiting[-1]
            until = last.arrived + last.patience
            if last is not newest or time.monotonic() >= until:
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
        """Fetch a message's files into the workspace; one that can't be had is named."""
        return [self._fetch(kiro, file) for file in files_of(incoming.message)]

    def _fetch(self, kiro: Kiro, file: TelegramFile) -> Attachment:
        if file.is_quoted and (path := upload_like(file, kiro.workspace)):
            return Attachment(path, "", file.is_image)
        try:
            chunks = self._attended(self.conversation.chat.download(file))
            path = self.conversation.aside(lambda: save(chunks, kiro.workspace, file.name))
        except (TelegramError, OSError) as error:
            reason = getattr(error, "description", None) or getattr(error, "strerror", None) or str(error)
            log.warning("A file of %s/%s could not be had: %s", *self.conversation.key, reason)
            self.conversation.notes.add(f"⚠️ I could not get {harmless_name(file.name)}: {reason}")
            return Attachment("", f"{harmless_name(file.name)}: {reason}", False)
        is_speech = file.is_speech and self._settings.transcribe_command
        return Attachment(path, "", file.is_image, self._transcribe(path, kiro.workspace) if is_speech else "")

    def _transcribe(self, path: str, workspace: str) -> str:
        """Return what is said in a voice note, and let the user see it; nothing when it could not be understood."""
        doing, self.doing = self.doing, "🎙 Listening…"
        conversation, trouble = self.conversation, ""
        try:
            text = conversation.aside(lambda: transcribe(path, workspace, self._settings, lambda: self.phase is not Phase.WAITING))
        except (OSError, ValueError) as error:
            text, trouble = "", getattr(error, "strerror", None) or str(error)
            log.warning("A voice note of %s/%s could not be understood: %s", *conversation.key, trouble)
        shown = shortened(f"🎙 {text}", PLAIN_LIMIT // 2) if text else (
            f"🎙 The voice note could not be understood, so Kiro gets the file.\n{shortened(trouble, 200)}")
        conversation.bot.errand(conversation.key, conversation.tell, shown)
        self.doing = doing
        return text

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
        raise KiroRefusal(frame["error"], kiro.agent)

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
SPEECH = ("voice", "video_note")
TRANSCRIBE_SECONDS = 120
TRANSCRIBE_GLANCE = 0.05        # seconds between two looks at it
TRANSCRIPT_AT_MOST = 100_000    # bytes
IMAGE_BYTES = 3_700_000         # of one image block [acp 7]
IMAGES_BYTES = 12_000_000       # base64 of all image blocks of a prompt
IMAGES_AT_MOST = 10             # of a prompt [acp 7]
IMAGE_SIZES = re.compile(rb"\A\x89PNG.{12}(.{4})(.{4})|\xff[\xc0-\xc3\xc5-\xcf]\0[\x0b\x11\x14]\x08(..)(..)", re.S)
IMAGE_HEAD = 256 * 1024         # where an image says its size
IMAGE_EDGE = 2000               # pixels; larger images can poison a session [acp 4.6]
NAME_LENGTH = 100               # bytes of a saved file's name
DOWNLOAD_SECONDS = 15 * 60
DOWNLOAD_CHUNK = 64 * 1024
DOWNLOAD_LIMIT = 20 * 1024 * 1024       # of the official Bot API server [tg 4]
FILE_KINDS = ["photo", "animation", "document", "audio", "voice", "video", "video_note", "sticker"]   # one has a document too
DEFAULT_TYPES = {"photo": "image/jpeg", "voice": "audio/ogg", "video": "video/mp4", "video_note": "video/mp4",
                 "audio": "audio/mpeg", "sticker": "image/webp"}
LINE_KINDS = ["venue", "location", "contact", "poll", "dice", "checklist"]      # a venue has a location too
TEXTS = {"summary": "", "text": "entities", "alternative_text": "", "button": "", "caption": "caption_entities", "credit": ""}
UNREAD = {"text": "(This could not be read.)"}     # in the place of a quote


class Attachment(NamedTuple):
    """A file that came with a message."""
    path: str                   # absolute, in the workspace; empty when it could not be had
    trouble: str                # why not
    is_image: bool              # small enough to be shown to the model
    heard: str = ""             # what was said in it, if it could be understood


def transcribe(path: str, workspace: str, settings: Settings, stopped: Callable[[], bool]) -> str:
    """Return what the owner's command prints for a recording.  Raises OSError, and ValueError that says why there is none."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([*settings.transcribe_command, path], cwd=workspace, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=err, start_new_session=True, env=child_environment(settings, "transcribe"))
        limit = time.monotonic() + TRANSCRIBE_SECONDS
        try:
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:     # not reaped: its pid is its own
                if stopped() or time.monotonic() > limit or os.fstat(out.fileno()).st_size > TRANSCRIPT_AT_MOST:
                    raise ValueError("it was stopped" if stopped() else f"no end in {TRANSCRIBE_SECONDS} s, or too much of it")
                time.sleep(TRANSCRIBE_GLANCE)
        finally:
            _kill(-process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        text = out.read(TRANSCRIPT_AT_MOST).decode(errors="replace").strip()
        if process.returncode or not text:
            said = err.read(TRANSCRIPT_AT_MOST).decode(errors="replace").strip()
            raise ValueError(said.splitlines()[-1] if said else f"exit status {process.returncode}, and no text")
        return text


def contents(message: dict) -> tuple[str, list[TelegramFile]]:
    """Return what a message itself brings: its words and its file."""
    return words(message), file_in(message)


def words(message: dict) -> str:
    """Return what the person wrote [tg 2.1], as Markdown; a place, a poll and the like as one line."""
    kind = next((kind for kind in LINE_KINDS if kind in message), "")
    lines = [_inside({**message, **message.get("rich_message", {})}),
             message.get("sticker", {}).get("emoji", ""),
             f"[{kind}: {json.dumps(message[kind], ensure_ascii=False)}]" if kind else ""]
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
        ticks = "`" * (1 + max([2 * (kind == "pre"), *map(len, re.findall("`+", text))]))
        return f"\n{ticks}{value.get('language', '')}\n{text}\n{ticks}\n" if kind == "pre" else ticks + text + ticks
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
    return above + "\n\n" * bool(above) + (f"[Forwarded from {author(forward)}]\n" if forward else "") + words(message)


def author(origin: dict) -> str:
    """Return the name of whom a forward or a quote is from."""
    facts = {**origin, **next((value for value in origin.values() if isinstance(value, dict)), {})}
    names = map(facts.get, ("title", "first_name", "last_name", "sender_user_name"))
    return " ".join(filter(None, names)) or "somebody"


def text_block(incoming: Incoming) -> str:
    """Return everything that one message says, files included."""
    lines = [full_text(incoming.message)]
    for attachment in incoming.files or ():
        lines.append(attachment.heard)
        lines.append(f"[File: {attachment.path}]" if attachment.path else f"[A file could not be had: {attachment.trouble}]")
    return "\n".join(line for line in lines if line)


def join_texts(batch: list[Incoming]) -> str:
    """Join messages to one text; a pasted text that the client split is put together again."""
    text, last = "", None
    for incoming in batch:
        split = last and len(last.message.get("text", "")) >= SPLIT_TEXT_LENGTH and "forward_origin" not in incoming.message
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
        fits = len(data) <= IMAGE_BYTES and len(encoded) <= room and len(blocks) < IMAGES_AT_MOST
        if mime_type and fits and longer_edge(data) <= IMAGE_EDGE:
            room -= len(encoded)
            blocks.append({"type": "image", "mimeType": mime_type, "data": encoded})
    return blocks


def image_type(data: bytes) -> str:
    """Return the MIME type of an image by its first bytes, or nothing."""
    for start, mime_type in ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif")):
        if data.startswith(start):
            return mime_type
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def longer_edge(data: bytes) -> int:
    """Return the longest edge in pixels that a PNG or JPEG image speaks of, 0 when it is another kind."""
    found = IMAGE_SIZES.finditer(data, 0, IMAGE_HEAD)
    return max((int.from_bytes(edge, "big") for size in found for edge in size.groups(b"")), default=0)


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
        fitting = [p for p in media if max(p["width"], p["height"]) <= IMAGE_EDGE] or media[:1]
        media = max(fitting, key=lambda p: p["width"] * p["height"])
    if not media or media.get("is_animated") or media.get("is_video"):      # a sticker that no model can look at
        return []
    mime_type = media.get("mime_type") or DEFAULT_TYPES.get(kind, "")
    name = media.get("file_name") or f"{kind}_{message.get('message_id', '')}{mimetypes.guess_extension(mime_type) or ''}"
    is_image = kind == "sticker" or mime_type in ("image/png", "image/jpeg")
    return [TelegramFile(media["file_id"], media.get("file_size", 0), name, is_image, kind in SPEECH)]


def upload_like(file: TelegramFile, workspace: str) -> str:
    """Return the path of an upload of this name and size, or nothing."""
    path = os.path.join(workspace, UPLOADS, harmless_name(file.name))
    return path if os.path.isfile(path) and os.path.getsize(path) == file.size else ""


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

SESSION_SECONDS = 90            # how long Kiro may take [acp 10], each but for silence: SILENCE_SECONDS if that is less
MISSING_SECONDS = 10            # for the load of a session whose file is missing or empty; some versions never answer that
MODEL_SECONDS = 5
LOCK_SECONDS = 15
REQUEST_PATIENCE = 4            # times its seconds, for a request during which Kiro keeps talking
REPLAY_SECONDS = 1.0            # for what some agents replay after their response to session/load
QUIET_SECONDS = 0.03            # a replay is over when nothing came for this long
FULL_CONTEXT = 80               # percent
COMMANDS_SHOWN, COMMAND_WIDTH = 20, 100
SAME_REFUSALS = 2               # so many turns refused in the same words are the session's fault
HISTORY_GONE = ("⚠️ Kiro no longer has this topic's session: its history is gone, a new one has begun. "
                "The folder is as it was. (The old session: {})")
NOTHING_KEPT = "ℹ️ Kiro kept nothing of what was said here before, so it starts afresh."


class KiroFailure(Exception):
    """Kiro could not do it; the text is for the user.  `again`: worth one more try with a fresh process."""

    code: Any = None               # of a JSON-RPC error
    ways: list = []                # to log in, as the agent told them

    def __init__(self, text: str, again: bool = False, said: str = "") -> None:
        super().__init__(text)
        self.again = again
        self.said = said or text   # all by which its kind is known


class KiroRefusal(KiroFailure):
    """A JSON-RPC error; Kiro itself is well."""

    def __init__(self, error: Any, agent: Optional[dict] = None) -> None:
        super().__init__(error_text(error), said=str(error))
        self.code = as_dict(error).get("code")
        self.ways = as_dict(agent).get("authMethods", [])


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
        self.spent = 0.0                       # in all turns since the bot knows the session
        self.full_told = False                 # that the context is nearly used up
        self.refusals: list[str] = []          # the last turns' errors, while they are the same

    def charge(self, credits: Optional[float]) -> None:
        """A turn has cost so much, if Kiro told."""
        self.credits = credits
        self.spent += credits or 0


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
        self.commands: list[str] = []           # Kiro's own, with what they do; replaced as a whole
        self.known = Known()
        self._lost = ""                         # a session that Kiro does not have any more
        self._refused = "", 0.0                 # how a session could not be loaded, and when
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
            kiro.agent = self.request(kiro, "initialize", INITIALIZE, self._settings.start_seconds)

    def _start(self) -> Kiro:
        """Start a process as soon as there is a place for it.  Raises KiroFailure, Stopped, Closing, NoPlace."""
        workspace = self.workspace()
        self._take_place()
        try:
            kiro = self.kiro = start_kiro(workspace, self._conversation)
        except (Stopped, Closing):
            self._places.give_back()
            raise
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
        """Let go of the process: it ends by itself, or is ended by its keeper."""
        kiro, self.kiro = self.kiro, None
        if kiro is None:
            return
        self._places.claim(self._conversation)
        kiro.kept_warm = False
        if not kiro.exit_noticed:
            self.former.append(kiro)
        kiro.end(patience=0 if at_once or kiro.agent is None else END_SECONDS)     # one that still starts holds no lock

    def _await_former(self) -> None:
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
        frame = kiro.responses.pop(request_id)
        if "error" in frame:
            raise KiroRefusal(frame["error"], kiro.agent)
        return frame["result"] if isinstance(frame.get("result"), dict) else {}

    def check_alive(self, kiro: Kiro, asked_at: float) -> None:
        """Raise if the process can't answer any more: given away, gone, or deaf."""
        if kiro is not self.kiro:
            raise NoPlace
        if kiro.exit_noticed:
            raise kiro.failure()
        patience = min(DEAF_SECONDS, self._settings.silence_seconds / 2)
        unread_for = time.monotonic() - max(asked_at, kiro.wrote_at)
        if kiro.agent and kiro.heard_at < asked_at and unread_for > patience and kiro.is_deaf():
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
        facts = self._store.get_facts(record.session_id)
        if record.session_id == self._lost:
            self._new_session(kiro)
            if facts.ended:
                gone = HISTORY_GONE.format(record.session_id)
                self._conversation.notes.add(NOTHING_KEPT if is_empty(record.session_id) else gone)
            return
        if not kiro.can_load:
            self._new_session(kiro)
            if facts.ended and not self._no_load_told:
                self._no_load_told = True
                self._conversation.notes.add("ℹ️ This agent can't reload sessions: each message starts without the history.")
            return
        self._await_former()                   # it has the lock, and may still be writing; so may an orphan
        if not facts.ended and is_empty(record.session_id) and lock_pid(record.session_id) is None:
            return self._new_session(kiro)
        try:
            self._load_session(kiro, record, facts)
        except KiroFailure as failure:
            before, self._refused = self._refused, (failure.said, time.monotonic())
            if isinstance(failure, KiroLocked) or not session_is_lost(failure, record.session_id, facts, before):
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

    def _load_session(self, kiro: Kiro, record: SessionRecord, facts: SessionFacts) -> None:
        """Load the session, dealing with its lock; what Kiro replays is dropped at the door [acp 3.3]."""
        params = {"sessionId": record.session_id, "cwd": record.workspace_path, "mcpServers": []}
        limit, pause, missing = time.monotonic() + LOCK_SECONDS, 0.25, has_vanished(record.session_id, facts)
        seconds = MISSING_SECONDS if missing or is_empty(record.session_id) else SESSION_SECONDS
        while True:
            try:
                result = self.request(kiro, "session/load", params, seconds)
                break
            except KiroRefusal as refusal:
                pid = lock_holder(refusal)
                if pid is None:
                    raise
                settle_lock(pid, record.session_id, self._settings, self._store)
                if time.monotonic() > limit:
                    raise KiroLocked(f"The session is still locked by process {pid}. Try again in a minute. If nothing uses it "
                                     f"any more, remove {session_file(record.session_id, 'lock')} on the server, or begin "
                                     "another session with /new.") from refusal
            retry_at = time.monotonic() + pause
            while time.monotonic() < retry_at:
                self._conversation.wait(retry_at)
            pause = min(2 * pause, 2)
        self._let_replay_end(kiro)
        if missing and facts.ended and not kiro.replayed_before_response:      # some agents accept any id [acp 11]
            self._store.set_facts(record.session_id, ended=False, taught=False)
            self._conversation.notes.add(HISTORY_GONE.format(record.session_id))
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
        note_lock(kiro, self._store)

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
        elif name == "commands/available" or as_dict(update).get("sessionUpdate") == "available_commands_update":
            self.commands = command_lines(params.get("commands") or as_dict(update).get("availableCommands"))
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
        known = self._store.get_facts(self.kiro.session_id).taught
        self.kiro.lesson = "known" if known else "sent" if wanted else ""
        return [{"type": "text", "text": LESSON}] if self.kiro.lesson == "sent" else []

    def turn_ended(self, kiro: Kiro, properly: bool) -> None:
        """A turn of the session has ended, by itself or not: it has a history, and may know the tags now."""
        self.known.refusals.clear()
        self._note_facts(kiro.session_id, taught=kiro.lesson == "known" or kiro.lesson == "sent" and properly)

    def _note_facts(self, session_id: str, taught: bool) -> None:
        """Note that the session has a history, and whether Kiro knows the tags; no reason to lose an answer."""
        try:
            self._store.set_facts(session_id, ended=True, taught=taught, in_sight=is_in_sight(session_id))
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
        if is_login(failure):
            return login_advice(failure, self._settings)
        if not isinstance(failure, KiroRefusal) or PASSING.search(failure.said):
            return ""
        same = same_words(str(failure))
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
STDERR_KEPT = 4000              # characters
STDERR_LINE_AT_MOST = 200       # of which the last two are told, each cut to so many characters
REPLACED_SECONDS = 3            # for a program that is being replaced to be there again
END_SECONDS = 5                 # from the end of stdin to TERM [acp 10]
TERM_SECONDS = 2                # from TERM to KILL
GLANCE_SECONDS, AT_EXIT_SECONDS = 0.5, 0.01     # how often to look whether it has exited: with, and without its stdout
WRITABLE = select.EPOLLOUT | select.EPOLLET     # told once, and once more after each `modify`
LOCKS_BY_PID = "Kiro's locks name processes that can be seen from here"
NO_SIGN = re.compile(r".{0,3}|-.*|proc|python[\d.]*")      # words of KIRO_COMMAND by which Kiro is not known
FOLDER_MARK, OWNER_MARK, PROCESS_MARK = "TG_ACP_BOT", "TG_ACP_OWNER", "TG_ACP_PROCESS"   # in our children's environment
NOT_LOGGED_IN = re.compile(r"not\s+logged\s+in|authentication required|ExpiredToken|InvalidGrant|TokenExpired|AccessDenied",
                           re.I)
PASSING = re.compile(r"throttl|too ?many ?requests|usage limit|timed out", re.I)     # another session would not help [acp 4.5]
LOCKED = re.compile(r"active in another process \(PID (\d+)\)")
LOST = re.compile(r"session[^:;,]{0,80}(not found|does ?n.t exist|does not exist|unknown|no such|not exist)|"
                  r"(unknown|no such|invalid|missing) session|no session (with|by|for|of|named)|resource.not.found",
                  re.I | re.S)
LOGIN_REQUIRED, RESOURCE_NOT_FOUND = -32000, -32002
REFUSED_AGAIN_SECONDS = 3       # between two refusals in the same words that count as two
SAYS_NOTHING = re.compile(r"\s*|internal error\.?", re.I)
HISTORY = {"user_message_chunk", "agent_message_chunk", "agent_thought_chunk", "tool_call", "tool_call_update"}   # a replay's
FRAME = {"method": str,
         "params": {"update": {"sessionUpdate": str, "toolCallId": str, "title": str, "kind": str, "status": str}},
         "result": {"stopReason": str, "agentCapabilities": {"promptCapabilities": {}}, "agentInfo": {}, "authMethods": list}}


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
        said = [line.strip()[:STDERR_LINE_AT_MOST] for line in self.stderr.splitlines() if line.strip()]
        return f"{name}: {'; '.join(said[-2:])}" if said else name

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
        self._line += data or b"\n"     # the last one may lack its end
        if not data or b"\n" in data:
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
    ("response", kiro, frame), ("permission", kiro, id, params), ("notification", kiro, method, params), ("exit", kiro).

    It has a place, which is given back when nothing of it is left.
    """

    def __init__(self, bot: Bot, workspace: str, post: Callable[..., None]) -> None:
        """Start the process and list it.  Raises OSError and ValueError, and Closing."""
        self._bot, self._post = bot, post
        self.workspace = workspace
        self.heard_at = time.monotonic()
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
        self.lock_pid: Optional[int] = None      # which of its processes its session's lock names
        self._next_id = self._prompt_id = 0
        mark = f"{os.getpid()}.{secrets.token_hex(6)}"
        with bot.spawning:
            if bot.closing.is_set():
                raise Closing
            super().__init__(mark, bot.settings.kiro_command, cwd=workspace, umask=bot.settings.umask,
                             env=child_environment(bot.settings, mark, workspace))
            bot.processes.add(self)

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
        self.send(json.dumps({"jsonrpc": "2.0", **frame}).encode() + b"\n")

    # -- from Kiro -----------------------------------------------------------------------------------------------------

    @property
    def can_load(self) -> bool:
        """Does the agent say that it can reload sessions?  Kiro does."""
        return bool(as_dict(self.agent).get("agentCapabilities", {}).get("loadSession"))

    @property
    def takes_images(self) -> bool:
        """Does the agent take image blocks?"""
        return bool(as_dict(self.agent).get("agentCapabilities", {}).get("promptCapabilities", {}).get("image"))

    def _take(self, line: bytes) -> None:
        """Pass one frame on: a response, a request, a notification, or junk [acp 2]."""
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):
            return log.debug("Not JSON from Kiro %s: %.200r", self.pid, line)
        if not isinstance(frame, dict):
            return
        self.heard_at = time.monotonic()
        shape(frame, FRAME)
        method, params = frame.get("method"), frame.get("params", {})
        if method is None:
            self._take_response(frame)
        elif "id" in frame:
            self._take_request(frame["id"], method, params)
        elif self._is_of_interest(method, params):
            self._post("notification", self, method, params)

    def _take_response(self, frame: dict) -> None:
        request_id = frame.get("id")
        if type(request_id) is int and request_id <= self._next_id:
            self.turn_open &= request_id != self._prompt_id
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
        mine = params.get("sessionId") in (None, self.session_id)
        if method.startswith("_kiro"):
            return mine or not self.session_id
        kind = params.get("update", {}).get("sessionUpdate")
        if not self.session_id and kind in HISTORY:
            self.replayed_before_response = True
        return mine and method == "session/update" and (self.turn_open or kind == "available_commands_update")

    def failure(self) -> KiroGone:
        """Return the failure to raise when the process has gone.  Wrong usage and login are not worth a second try."""
        failure = KiroGone(f"Kiro has exited ({self.how_it_ended()}).", said=self.stderr)
        failure.again = not (self._popen.returncode == 2 or is_login(failure) or self.trouble)
        return failure

    def _part(self) -> None:
        self._bot.places.give_back()
        if self.lock_pid is not None:
            remove_lock(self.session_id, self.lock_pid)
        self._post("exit", self)
        with self._bot.spawning:                 # it may not be listed yet
            self._bot.processes.discard(self)


def start_kiro(workspace: str, conversation: Conversation) -> Kiro:
    """Start Kiro, and wait for one that is just being replaced by another version.  Raises as `Kiro`, and Stopped."""
    limit = time.monotonic() + REPLACED_SECONDS
    while True:
        try:
            return Kiro(conversation.bot, workspace, conversation.post)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.ETXTBSY) or time.monotonic() > limit:
                raise
        conversation.wait(time.monotonic() + 0.2)


def shape(value: dict, shapes: dict) -> None:
    """Take out of what an agent says whatever is not of the type that it should be; the rest of the code trusts these."""
    for key in shapes.keys() & value.keys():
        kind = shapes[key] if isinstance(shapes[key], type) else dict
        if not isinstance(value[key], kind):
            del value[key]
        elif kind is not shapes[key]:
            shape(value[key], shapes[key])


def child_environment(settings: Settings, mark: str, workspace: str = "") -> dict[str, str]:
    """Return Kiro's environment: ours without the token, with the marks by which a later run knows its orphans, and
    without git finding the bot's own checkout above an empty workspace."""
    secret = settings.token or "\0"
    env = {name: value for name, value in os.environ.items() if name != "BOT_TOKEN" and secret not in value}
    # The workspace's parent is another folder if WORKSPACE_BASE_PATH was changed since the thread began.
    ceilings = filter(None, [str(settings.workspaces), os.path.dirname(workspace), env.get("GIT_CEILING_DIRECTORIES")])
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
    if not ways or "kiro" in os.path.basename(settings.kiro_command[0]):
        ways = ["kiro-cli login --use-device-flow (or set KIRO_API_KEY)."]
    return "\nOn the server, as the bot's user: " + "\nor: ".join(ways)


def models_of(result: dict) -> Optional[Models]:
    """Return the models of a session/new or session/load result, in either dialect [acp 8, 11], or None."""
    try:
        models = result.get("models") or {}
        if offered := [(str(m["modelId"]), str(m.get("name") or m["modelId"])) for m in models.get("availableModels") or ()]:
            return Models(offered, str(models.get("currentModelId") or ""), None)
        for option in result.get("configOptions") or ():
            if option.get("category") == "model" and option.get("options"):
                choices = [c for o in option["options"] for c in o.get("options", [o])]      # groups, or not
                offered = [(str(c["value"]), str(c.get("name") or c["value"])) for c in choices]
                return Models(offered, str(option.get("currentValue") or ""), option.get("id") or "")
    except (TypeError, KeyError, AttributeError) as error:
        log.warning("The agent's list of models can't be read: %r", error)
    return None


# -- locks and lost sessions -------------------------------------------------------------------------------------------

def session_file(session_id: str, extension: str) -> Optional[Path]:
    """Return where Kiro keeps one of a session's files [acp 4.1]; None for an id that could lead elsewhere."""
    home = os.environ.get("KIRO_HOME") or os.path.expanduser("~/.kiro")
    return Path(home, "sessions", "cli", f"{session_id}.{extension}") if re.fullmatch(r"[\w-]+", session_id) else None


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
    if is_login(failure) or PASSING.search(failure.said) or LOCKED.search(failure.said):
        return False
    if is_empty(session_id) or has_vanished(session_id, facts):
        return True
    if not isinstance(failure, KiroRefusal) or facts.ended and is_in_sight(session_id):
        return False
    again = same_words(before[0]) == same_words(failure.said) and time.monotonic() - before[1] > REFUSED_AGAIN_SECONDS
    return again or not facts.ended or failure.code == RESOURCE_NOT_FOUND or bool(LOST.search(failure.said))


def same_words(text: str) -> str:
    """Return the text without ids and numbers, which differ from one time to the next."""
    return re.sub(r"[0-9a-f-]{8,}|\d+", "", text)


def lock_holder(failure: KiroFailure) -> Optional[int]:
    """Return the pid in Kiro's refusal to load a locked session, or None."""
    match = LOCKED.search(failure.said)
    return int(match[1]) if match else None


def note_lock(kiro: Kiro, store: SessionStore) -> None:
    """Note whether the lock that Kiro has just taken names its process: only then do the pids in locks mean something here."""
    pid = lock_pid(kiro.session_id)
    if pid is not None:
        kiro.lock_pid = pid if belongs(pid, kiro.mark, kiro.pid) else None
        store.set_note(LOCKS_BY_PID, "yes" if kiro.lock_pid else "")


def settle_lock(pid: int, session_id: str, settings: Settings, store: SessionStore) -> None:
    """Do what can be done about the process that holds a session's lock; return when loading may be tried again.

    A dying process of ours: nothing, its keeper ends it.  An orphan of ours: end it.  A dead process: remove its lock.
    Raises KiroLocked for a living stranger.
    """
    if environment_of(pid).get(OWNER_MARK) == owner_mark():
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


def is_orphan(pid: int, folder: Path) -> bool:
    """Has a former run of this folder's bot left the process behind?"""
    env = environment_of(pid)
    owner, _, began = env.get(OWNER_MARK, "").partition(".")
    lives = owner.isdigit() and is_running(int(owner)) and _stat(int(owner), START_TIME) == began
    return env.get(FOLDER_MARK) == str(folder) and not lives and pid != os.getpid()     # Kiro may have started this bot


def end_orphans(folder: Path) -> None:
    """End all that former runs of this folder's bot have left behind."""
    def find() -> list[int]:
        return running(lambda pid: is_orphan(pid, folder))

    if pids := find():
        log.warning("Ending what a former run has left behind: processes %s", pids)
        end_processes(find, TERM_SECONDS)


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

STATE, GROUP, START_TIME = 0, 2, 19     # fields of /proc/PID/stat


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _stat(pid: int, field: int) -> str:
    """Return one of the fields of /proc/PID/stat after the name; nothing when there is no process."""
    return "".join(os.fsdecode(_proc(pid, "stat")).rpartition(")")[2].split()[field:field + 1])


def is_running(pid: int) -> bool:
    """Does the process exist, and not as a zombie?"""
    state = _stat(pid, STATE)
    if state or pid <= 0:        # 0 and less name groups
        return state not in ("", "Z", "X")
    try:
        os.kill(pid, 0)          # there may be no descriptor to be had for /proc
        return True
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)        # somebody else's


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that the process was started with; empty when it is not ours to see."""
    return dict(pair.partition("=")[::2] for pair in os.fsdecode(_proc(pid, "environ")).split("\0"))


def belongs(pid: int, mark: str, group: int) -> bool:
    """Does the process carry the process mark in its environment, or is it of the process group?"""
    return environment_of(pid).get(PROCESS_MARK) == mark or _stat(pid, GROUP) == str(group)


def running(is_wanted: Callable[[int], bool]) -> list[int]:
    """Return the running processes that are wanted."""
    try:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError as error:     # no descriptor to be had: nobody can be found now
        log.error("Processes can't be listed: %s", error.strerror)
        pids = []
    return [pid for pid in pids if is_wanted(pid) and is_running(pid)]


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
        self.steps = 0                         # tool calls begun
        self.plan: list[tuple[str, str]] = []  # its entries: what, and pending, in_progress or completed
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
        elif kind == "plan" and isinstance(update.get("entries"), list):
            entries = map(as_dict, update["entries"])
            self.plan = [(one_line(str(entry.get("content")), PLAN_WIDTH), str(entry.get("status"))) for entry in entries]
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
        self.steps += update.get("sessionUpdate") == "tool_call"
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

    def progress(self) -> list[str]:
        """Return how far it is: the step from the second on, and of a plan how much is done and what comes now."""
        done = sum(status == "completed" for _, status in self.plan)
        now = next((what for wanted in ("in_progress", "pending") for what, status in self.plan if status == wanted), "")
        return [f"step {self.steps}"] * (self.steps > 1) + [f"{done}/{len(self.plan)} {now}".strip()] * bool(self.plan)

    def text(self) -> str:
        """Return what Kiro has said so far."""
        return whole_characters("".join(self._pieces)).replace("\r\n", "\n").strip("\n")

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


def plan_lines(plan: list[tuple[str, str]]) -> list[str]:
    """Return a plan's entries with their signs, as far as one wants to read them."""
    lines = [f"{PLAN_SIGNS.get(status, '☐')} {what}" for what, status in plan[:PLAN_LENGTH]]
    return lines + [f"… {len(plan) - PLAN_LENGTH} more"] * (len(plan) > PLAN_LENGTH)


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

    def refresh(self, answer: Answer, doing: str, clock: str) -> float:
        """Send a frame if there is news, or the last one is about to expire; return when to look again.

        `clock` is shown with what is being done, and is no news.
        """
        now, news = time.monotonic(), (answer.version, doing)
        if self.stopped:
            return math.inf
        if self._sent_at is not None and news == self._shown and now < self._sent_at + KEEP_ALIVE_SECONDS:
            return self._sent_at + KEEP_ALIVE_SECONDS
        wait = self._chat.frame_wait(self._sent_at, now)
        if wait:
            return now + wait
        self._sent_at = now
        said, _ = visible_text(answer.text(), still_coming=True)
        self._shown = news if self._chat.frame(self.id, said, (doing + clock).removeprefix(" · ")) else None
        return time.monotonic()


class Delivery:
    """Brings a topic's answers to Telegram, part by part, also those of a former run.  On the conversation's thread.

    A part is one lasting message, as JSON-able dict: {"kind": "plain" | "rich" | "source", "text"}, where source is Markdown
    to be shown as plain text, {"kind": "whole", "text", "caption"}, which goes as a file, or {"kind": "file", "path",
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
            shown, files = visible_text(text, exists=self._has_file)
            shown = f"{close_code(shown)}\n\n{end}" if end and shown.strip() else shown if shown.strip() else end
            pieces = self._chat.parts(shown) if shown else []
        except Exception:   # a bug there must not cost an answer
            log.exception("An answer can't be formatted and is sent as it is")
            return plain_parts(text, simple_pieces)
        return pieces + [{"kind": "file", "path": path, "caption": caption} for path, caption in files] or plain_parts(NOTHING_SAID)

    def _has_file(self, path: str) -> bool:
        """Is there such a file in the topic's folder, as far as one can see?"""
        try:
            return os.path.lexists(os.path.join(self._conversation.agent.workspace(), path))
        except (StoreError, KiroFailure):
            return True

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
RICH_SHORT = 6000               # characters where a blank line allows it: clients were seen to cut longer ones
RICH_BLOCKS = 480               # of 500, with room for a list or a table that goes on [tg 2.1]
PARTS_AT_MOST = 20              # of an answer; of a longer one some are shown at both ends, and all of it goes as a file
PARTS_SHOWN = 3
ANSWER_FILE = "answer.md"
TOO_MUCH = ("too long", "TEXT_TOO_LONG", "BLOCKS_TOO_MANY")    # a smaller part may be taken [tg 2.2]
HALVED_AT_LEAST = 1000          # a rich part that is refused although it is smaller goes plain
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
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL):
            proxy = requests.utils.select_proxy(self._api_url, self._session.proxies)
            name = next((name for name, value in os.environ.items() if value == proxy), "TELEGRAM_API_URL")
            raise SettingsError(f"{name} can't be used: it is a bad address, or one for SOCKS without PySocks") from None
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


def source_parts(text: str) -> list[dict]:
    """Return Markdown as parts that show it as plain text, its code monospaced."""
    return [{**part, "kind": "source"} for part in plain_parts(text)]


def abridged(parts: list[dict], text: str) -> list[dict]:
    """Return the parts of an answer, or of one that has too many the first and the last, and a file with all of its text."""
    if len(parts) <= PARTS_AT_MOST:
        return parts
    caption = f"✂️ {len(parts) - 2 * PARTS_SHOWN} messages are left out here: this is the whole answer."
    whole = {"kind": "whole", "text": whole_characters(text), "caption": caption}
    return [*parts[:PARTS_SHOWN], whole, *parts[-PARTS_SHOWN:]]


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
        is_rich = self._rich and self._telegram.rich and has_markdown(text)
        parts = [{"kind": "rich", "text": piece} for piece in rich_pieces(text)] if is_rich else source_parts(text)
        return abridged(parts, text)

    def send(self, part: dict, buttons: Optional[Buttons] = None) -> list[dict]:
        """Send a part of an answer; return other parts when it has to be sent in their form instead."""
        try:
            if part["kind"] == "rich":
                rich = types.InputRichMessage(markdown=rich_safe(part["text"]), skip_entity_detection=True)
                self._post(apihelper.send_rich_message, rich, reply_markup=markup(buttons))
            elif part["kind"] == "source":
                self._post_source(part["text"], buttons)
            elif part["kind"] == "whole":
                file = io.BytesIO(part["text"].encode())
                file.name = ANSWER_FILE
                self._post(send_document, file, caption=part["caption"])
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
        kind, text = part["kind"], part["text"]
        if kind == "rich" and refusal.code == 404 and "chat" not in refusal.description:    # a server that lacks the method
            self._telegram.rich = False
        if len(text) > (HALVED_AT_LEAST if kind == "rich" else 1) and any(words in refusal.description for words in TOO_MUCH):
            half = split_text(text, max(utf16_length(text) * 2 // 3, 1), utf16_length)
            return [{**part, "text": piece} for piece in half]
        if kind in ("rich", "whole"):
            return source_parts(text)
        if part.get("last_word"):
            log.error("Nor can that be said to %s", self._user_id)
            return []
        return [{**plain_part(f"⚠️ Telegram refused a part of the answer: {refusal.description}"), "last_word": True}]

    def _post_source(self, text: str, buttons: Optional[Buttons]) -> Any:
        """Send Markdown as plain text with its code monospaced, or as it is if Telegram does not take that."""
        shown, entities = plain_form(text)
        try:
            return self._post_plain(shown, buttons, entities=entities)
        except Refused:
            if not entities:
                raise
        return self._post_plain(text, buttons)

    def _post_plain(self, text: str, buttons: Optional[Buttons] = None, seconds: float = ANSWER_SECONDS, **kwargs: Any) -> Any:
        return self._post(apihelper.send_message, text if text.strip() else "…", seconds=seconds,
                          reply_markup=markup(buttons), link_preview_options=NO_PREVIEW, **kwargs)

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

# `read` goes through a text once, as GitHub's Markdown has it, and says of each line what it is part of.  Everything else asks
# it: what is code, where to cut, what a message costs, what is closed at its end.  Then SIGN is looked for in one paragraph or
# cell at a time.
#
# `re` holds the interpreter's lock while it searches, so each pattern must be linear on any text: no inner part can be read in
# two ways, and what is looked for in vain ends before another of its kind, at a line's end, or after 2000 characters.
#
#     BOX, BOX_IN_TEXT, QUOTE   what a quote or an item begins with; at one place of a line
#     LEAF, LEAF_IN_TEXT        what else a line may be; the same
#     FENCE_END, FENCED, RULE   the end of a code block, all of one, the line below a table's head; runs, lines, cells
#     CELL, NUMBER              runs of what is no bar, of digits
#     SIGN, IMAGE, REFERENCE    signs outside of code, one after the other: a run of ` is tried for 2000 characters, a bracket
#                               to the next one, a target to a blank or its ninth pair of parentheses, a title to a quote
#     SAFE_URL                  an address that Telegram takes; its parts end at a dot
#     FILE_TAG, WORD, CUT_TAG, TAG_BEGINNING   <send_file>; attributes and caption end at the next < or >
#     FORMATTED                 is there anything to format; ends at the next sign of its kind

LINE = r"[ ]{0,3}(?P<sign>[-*_])(?:[ \t]*(?P=sign)){2,}[ \t]*$"
BOX = re.compile(rf"(?!{LINE})[ ]{{0,3}}(?:>[ \t]?|(?:(?P<number>\d{{1,9}})[.)]|[-+*])"
                 r"(?:[ \t]{1,4}(?=\S)|[ \t](?=[ \t])|(?=[ \t]*$)))")
BOX_IN_TEXT = re.compile(rf"(?!{LINE})[ ]{{0,3}}(?:>[ \t]?|(?:(?P<number>1)[.)]|[-+*])"
                         r"(?:[ \t]{1,4}(?=\S)|[ \t](?=[ \t]+\S)))")
QUOTE = re.compile(r"[ ]{0,3}>[ \t]?")
BLOCK = (rf"(?P<line>{LINE})|(?P<blank>[ \t]*$)|(?P<heading>[ ]{{0,3}}\#{{1,6}}(?=[ \t]|$))"
         r"|(?P<fence>[ ]{0,3}(?P<mark>`{3,80}(?=[^`]*$)|~{3,80}(?!~)))")
DEFINITION = r"""[ ]{0,3}\[(?!\^)(?P<name>[^\[\]]+)\]:[ \t]*<?(?P<url>[^\s<>]+)>?(?:[ \t]+(?:"[^"]*"|'[^']*'))?[ \t]*$"""
LEAF = re.compile(rf"{BLOCK}|(?P<indented>[ ]{{4}}|[ ]*\t)|(?P<definition>{DEFINITION})|(?P<text>)")
LEAF_IN_TEXT = re.compile(rf"(?P<underline>[ ]{{0,3}}(?:=+|-+)[ \t]*$)|{BLOCK}|(?P<text>)")
FENCED = re.compile(r"[ ]*(?P<mark>`{3,}|~{3,})[ ]*(?P<language>\S*)[^\n]*\n?(?P<code>.*?)"
                    r"(?:(?<=\n)[ >]*(?P=mark)[`~]*[ \t]*)?", re.S)
FENCE_END = re.compile(r"[ ]{0,3}(`{3,}|~{3,})[ \t]*$")
RULE = re.compile(r"(?=.*\|)\|?(?:[ \t]*:?-+:?[ \t]*\|)*[ \t]*(?::?-+:?)?")
CELL = re.compile(r"(?:\\.|[^\\|\n])+|(?<=\|)(?=\|)")
NUMBER = re.compile(r"\d+")
CODE_SPAN = r"(?P<code>(?<!`)(?P<ticks>`+)(?!`)(?:[^\n]|\n(?![ \t>]*\n)){0,2000}?(?<!`)(?P=ticks)(?!`))"
LABEL = r"(?:\\.|`[^`\n]*`|!\[[^\[\]]*\]\([^()\s]*\)|(?<!!)\[[^\[\]]*\](?!\()|[^\[\]\\`!]|!(?!\[))*"
STOP = r"\s\\<>\"`|\[\]()“”„‘’…«»‹›،؛؟।、-〃〈-〟！-／：-？［-］｛-･"     # what ends an address in a sentence, in any script
SIGN = re.compile(rf"""
    (?P<escape>\\[!-/:-@\[-`{{-~]) | {CODE_SPAN}
    | (?P<link>(?P<image>!?)\[(?P<label>{LABEL})\]\([ ]{{0,3}}(?:<(?P<angle>[^<>\n]*)>|(?P<target>(?!<)[^\s()]*
        (?:\([^\s()]*\)[^\s()]*){{0,8}}))(?:[ ]{{1,3}}(?:"[^"\n]*"|'[^'\n]*'))?[ ]{{0,3}}\))
    | (?P<newline>\\\n|(?<![ ]{{2}})\n)
    | (?P<start>^[ \t>]*(?:\d{{1,9}}(?=[.)](?:\s|$))|(?=[-+*](?:\s|$)|\#{{1,6}}[^\s\#]|\[(?!\^)[^\[\]\n]+\]:)))
    | (?P<address>(?<![a-zA-Z\d])<?https?://(?:[^*{STOP}]|\*(?!\*)|\([^{STOP}]*\))+>?)
    | (?P<br>(?<!\s)<br[ ]*/?>|<br[ ]*/?>$)
    | (?P<mark>`+|\$|<|==+|\|\|+|!(?=\[|<?https?://)|(?<=\])\()""", re.M | re.X)
IMAGE = re.compile(r"!\[([^\[\]]*)\]\([^()\s]*\)")
REFERENCE = re.compile(r"(?<!\\)(?P<image>!?)\[(?P<label>[^\[\]\n]+)\](?:\[(?P<name>[^\[\]\n]*)\]|(?![(\[:]))")
SAFE_URL = re.compile(r"https?://(?:[\w.-]+\.(?:[A-Za-z][A-Za-z\d-]+|[^\W\d_A-Za-z]{2,})|\d{1,3}(?:\.\d{1,3}){3})(?::\d{1,5})?"
                      r"(?:[/?#]\S*)?|tg://\w\S*|mailto:[\w.+-]+@[\w-]+\.[\w.-]+")
FILE_TAG = re.compile(r"""(?P<before>[^\s>][ ]?)?(?P<tag><send_file\s+path\s*=\s*"""
                      r"""(?:"(?P<double>[^"<>\n]*)"|'(?P<single>[^'<>\n]*)'|(?P<bare>[^\s"'<>]+?))"""
                      r"""(?:\s[^<>]*?)?(?:/>|>(?:(?P<caption>(?:(?!<send_file\b).)*?)</send_file>)?))""", re.S)
WORD = re.compile(r" ?[^\s<]")
CUT_TAG = re.compile(r"<send_file\s+path\s*=[^<>]*\Z")
TAG_BEGINNING = re.compile(r"<(?:s(?:e(?:n(?:d(?:_(?:f(?:i(?:l(?:e[^<>]*)?)?)?)?)?)?)?)?)?\Z")
TAG_START, TAG_END = "<send_file", "</send_file>"
FORMATTED = re.compile(r"`[^`\n]+`|\]\(\S|~~[^\s~][^~\n]*~~|\*\*(?![\s*./])[^*\n]*[^\s*/]\*\*"
                       r"|(?<![\w*/])\*(?![\s*./])[^*\n]*[^\s*/]\*(?![\w*])|(?<![\w/])_(?![\s_])[^_\n]*[^\s_]_(?!\w)"
                       r"|(?<![\w/])__(?![\s_]|[a-z\d]*__)[^_\n]*[^\s_]__(?!\w)")
DEPTH_AT_MOST = 8               # of quotes and items; a list in a list has two levels of Telegram's 16 [tg 2.1]
COLUMNS_AT_MOST = 20
ENTITIES_AT_MOST = 100
OPENING_AT_MOST = 200           # characters of a table's head that are repeated

Stretch = tuple[int, int, str]          # start and end in a text, and what is or shall be there


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


class Box(NamedTuple):
    """A quote or a list's item that is open."""

    goes_on: re.Pattern[str]    # how another line of it begins
    number: int                 # of a numbered item, else 0


class Line(NamedTuple):
    """A line, and what it is part of."""

    start: int
    at: int                     # where its words start, behind the marks of quotes and items
    end: int
    kind: str                   # blank, text, underline, heading, line, definition, fence, code, end, indented, head, rule, row
    block: int                  # the start of its block
    rank: int                   # of a cut before it: 4 between paragraphs, 3 blocks, 2 in an item, 1 a block, 0 a line, -1 none
    cost: int                   # how many of Telegram's blocks begin here
    boxes: tuple[Box, ...]
    number: int = 0             # of the numbered item that begins here
    closing: str = ""           # what a message that ends here has to end with: the ``` of code
    opening: str = ""           # what the next one has to begin with: the same, a table's head


def read(text: str) -> list[Line]:
    """Return the lines of a text, and what each is part of."""
    last, start, lines = Line(0, 0, 0, "blank", 0, 0, 0, ()), 0, []
    for words in text.removesuffix("\n").split("\n"):
        line = read_line(text, last, start, start + len(words))
        if line.kind == "rule":
            lines[-1] = last._replace(kind="head", block=last.start, rank=max(last.rank, 2), cost=last.cost + 1)
        lines.append(line)
        last, start = line, line.end + 1
    return lines


def read_line(text: str, last: Line, start: int, end: int) -> Line:
    """Return what the line behind another one is."""
    going, at = go_on(text, last.boxes, start, end)
    inside = going == len(last.boxes)
    here = last._replace(start=start, at=at, end=end, rank=1, cost=0, number=0)
    if last.closing and inside:
        mark = FENCE_END.match(text, at, end)
        ends = mark and mark[1].startswith(last.closing.strip("> "))
        return here._replace(kind="end", rank=-1, closing="", opening="") if ends else here._replace(kind="code")
    boxes, at = begin(text, last, going, at, end)
    begun = boxes[going:]
    kind = (LEAF_IN_TEXT if last.kind == "text" and not begun else LEAF).match(text, at, end).lastgroup
    if kind == "text" and inside and not begun:
        if last.kind in ("rule", "row"):
            return here._replace(kind="row", cost=1)
        rule = text[at:end].strip()
        if last.kind == "text" and RULE.fullmatch(rule) and columns(rule) == columns(text[last.at:last.end]):
            return here._replace(kind="rule", rank=-1, cost=1, block=last.start, opening=f"{text[last.start:end]}\n")
    if kind == last.kind in ("text", "indented") and not begun:
        return here                            # text also without the marks of its boxes
    rank = {"blank": 1, "underline": -1}.get(kind, 4 if last.kind == "blank" else 3)
    if rank > 2 and any(box.goes_on is not QUOTE for box in boxes[:going]):
        rank = 2
    number = next((box.number for box in begun if box.number), 0)
    line = Line(start, at, end, kind, start, rank, len(begun) + (kind != "blank"), boxes, number)
    if kind == "fence":
        before = margin(text, line)
        return line._replace(closing=before + LEAF.match(text, at, end)["mark"], opening=f"{before}{text[at:end]}\n")
    return line


def go_on(text: str, boxes: tuple[Box, ...], at: int, end: int) -> tuple[int, int]:
    """Return how many of the boxes a line is in, and where it goes on behind their marks."""
    for n, box in enumerate(boxes):
        match = box.goes_on.match(text, at, end)
        if not match:
            return n, at
        at = match.end()
    return len(boxes), at


def begin(text: str, last: Line, going: int, at: int, end: int) -> tuple[tuple[Box, ...], int]:
    """Return the boxes with those that begin here, and where the line goes on."""
    boxes, former = last.boxes[:going], last.boxes[going:]
    match = (BOX_IN_TEXT if last.kind == "text" and not former else BOX).match(text, at, end)
    while match and len(boxes) < DEPTH_AT_MOST:
        goes_on = QUOTE if ">" in match[0] else re.compile(f"[ ]{{{len(match[0])}}}|\t|(?=[ \t]*$)")
        number = int(match["number"] or 0)
        if number and former and former[0].number:
            number = former[0].number + 1
        boxes, former, at = (*boxes, Box(goes_on, number)), (), match.end()
        match = BOX.match(text, at, end)
    return boxes, at


def margin(text: str, line: Line) -> str:
    """Return how a line begins that is in the same quotes and items."""
    return re.sub(r"[^>\s]", " ", re.sub(r">(?! )", "> ", text[line.start:line.at]))


def columns(row: str) -> int:
    """Return how many cells a table's line has."""
    return len(CELL.findall(row.strip()))


def blocks(text: str) -> Iterator[list[Line]]:
    """Yield the lines of each block."""
    for _, lines in itertools.groupby(read(text), key=lambda line: line.block):
        yield list(lines)


def stretches(text: str, block: list[Line]) -> Iterator[tuple[int, int]]:
    """Yield where inline signs belong together: in a paragraph, or in a cell."""
    if block[0].kind in ("text", "heading", "definition"):
        yield block[0].at, block[-1].end
    elif block[0].kind == "head":
        for line in block[:1] + block[2:]:
            yield from (cell.span() for cell in CELL.finditer(text, line.at, line.end))


def code_in(text: str, kinds: tuple[str, ...] = ("fence", "indented")) -> Iterator[Stretch]:
    """Yield where blocks of these kinds and code spans are, and of what kind each is."""
    for block in blocks(text):
        if block[0].kind in kinds:
            yield block[0].at, block[-1].end, block[0].kind
            continue
        for start, end in stretches(text, block):
            yield from ((*sign.span(), "span") for sign in SIGN.finditer(text, start, end) if sign["code"])


def without_code(text: str) -> str:
    """Return the text with all code blotted out."""
    return changed(text, ((start, end, "`" * (end - start)) for start, end, _ in code_in(text)))


def visible_text(text: str, still_coming: bool = False,
                 exists: Callable[[str], bool] = lambda path: True) -> tuple[str, list[tuple[str, str]]]:
    """Return the text without its file tags, and the (path, caption) of each; a tag in code is text, and so is one in the
    midst of a sentence whose file does not exist.

    While the text is still coming, the beginning of a tag at its end is hidden too.
    """
    if "<" not in text:
        return text, []
    files, kept, at = [], [], 0
    uncoded = without_code(text)
    for match in FILE_TAG.finditer(uncoded):
        path = (match["double"] or match["single"] or match["bare"] or "").strip()
        if match["before"] and WORD.match(text, match.end()) and not exists(path):
            continue
        kept.append(text[at:match.start("tag")])
        at = match.end()
        if still_coming and not match[0].endswith(("/>", TAG_END)) and TAG_START not in uncoded[at:]:
            at = len(text)                     # its caption is still coming
            break
        files.append((path, text[slice(*match.span("caption"))].strip()))
    cut = (TAG_BEGINNING if still_coming else CUT_TAG).search(uncoded, at)
    return "".join([*kept, text[at:cut.start() if cut else None]]).strip("\n"), files


def has_markdown(text: str) -> bool:
    """Is there anything to format, and no deeper than Telegram takes it?"""
    lines = read(text)
    return max(len(line.boxes) for line in lines) < DEPTH_AT_MOST and (
        any(line.boxes or line.kind not in ("blank", "text") for line in lines) or bool(FORMATTED.search(text)))


def close_code(text: str) -> str:
    """Return the text with a code block that is open at its end closed."""
    closing = read(text)[-1].closing
    return text.removesuffix("\n") + "\n" + closing if closing else text


def changed(text: str, changes: Iterable[Stretch]) -> str:
    """Return the text after changes, which are in order: start, end, and what is to be there instead."""
    shown, at = [], 0
    for start, end, new in changes:
        shown += text[at:start], new
        at = end
    return "".join(shown) + text[at:]


def plain_form(text: str) -> tuple[str, list[dict]]:
    """Return the text with code and tables marked by entities instead of by signs; what is too much for that stays."""
    shown, entities, at = "", [], 0
    for start, end, kind in itertools.islice(code_in(text, ("fence", "indented", "head")), ENTITIES_AT_MOST):
        inner, entity = text[start:end], {"type": "pre"}
        if kind == "span":
            inner, entity = inner.strip("`"), {"type": "code"}
        elif kind == "fence":
            fence, indent = FENCED.fullmatch(inner), start - text.rfind("\n", 0, start) - 1
            inner = re.sub(f"(?m)^[ >]{{0,{indent}}}", "", fence["code"]).removesuffix("\n")
            entity["language"] = fence["language"]
        shown, at = shown + text[at:start], end
        if inner.strip():
            entities.append({**entity, "offset": utf16_length(shown), "length": utf16_length(inner)})
        shown += inner
    return shown + text[at:], entities


# -- rich messages -----------------------------------------------------------------------------------------------------


def rich_safe(text: str) -> str:
    """Return Markdown that Telegram neither refuses nor garbles, and that makes it fetch nothing [tg 2.1-2.3]."""
    text = resolved(text)
    return changed(text, safe_changes(text))


def safe_changes(text: str) -> Iterator[Stretch]:
    """Yield what rich_safe changes."""
    for block in blocks(text):
        first, last = block[0], block[-1]
        if first.kind == "head" and columns(text[first.at:first.end]) > COLUMNS_AT_MOST:
            yield first.at, first.at, f"```\n{margin(text, first)}"
            yield last.end, last.end, f"\n{margin(text, first)}```"
        elif last.closing:
            yield last.end, last.end, "\n" + last.closing
        else:
            for start, end in stretches(text, block):
                yield start, end, SIGN.sub(safe_sign, text[start:end]) or " "


def safe_sign(sign: re.Match[str]) -> str:
    """Return what stands for a sign; code and escapes stay as they are."""
    kind, words = sign.lastgroup, sign[0]
    if kind == "link":
        return safe_link(sign)
    if kind == "address":
        words = words.strip("<>")
        url = words.rstrip(".,;:!?'*~" + "_" * sign.string.endswith("_", 0, sign.start()))      # what ends the sentence
        return linked(safe_label(url), url) + words[len(url):]
    if kind == "mark":
        return safe_label(words)
    return {"start": words + "\\", "newline": "  \n", "br": " "}.get(kind, words)


def safe_link(link: re.Match[str]) -> str:
    """Return a link that Telegram takes, or else label and target as text: a relative path would refuse it all."""
    target, words = (link["angle"] or link["target"] or "").strip(), link["label"].strip("`* ")
    label = SIGN.sub(lambda sign: safe_label(sign[0]) if sign["address"] else safe_sign(sign), IMAGE.sub(r"\1", link["label"]))
    if SAFE_URL.fullmatch(target):
        return linked(label if words else safe_label(target), target)
    if not link["image"] and re.match(r"[\w)\]]", link.string[link.start() - 1:link.start()]):
        return f"\\[{label}]\\({target})"      # f[a](b)
    if not words or f"/{target}".partition("#")[0].endswith(f"/{words}"):
        return linked("", target)
    return f"{label} ({linked('', target)})" if target.strip("`") else label


def linked(label: str, url: str) -> str:
    """Return a link, or what can't be one as code."""
    if SAFE_URL.fullmatch(url):
        return f"[{label}]({url.replace('$', '%24')})"
    return f"`{url.replace('`', '')}`" if url.strip("`") else ""


def safe_label(words: str) -> str:
    """Return the words with all signs escaped."""
    return re.sub(r"([\\`*_\[\]($>=|~!])", r"\\\1", words).replace("<", "&lt;")


def resolved(text: str) -> str:
    """Return the text with the targets in its links that are defined on lines of their own."""
    lines = read(text) if "]:" in text else []
    definitions = [LEAF.match(text, line.at, line.end) for line in lines if line.kind == "definition"]
    urls = {definition["name"].lower(): definition["url"] for definition in reversed(definitions)}
    changes, used = [], set()
    for link in REFERENCE.finditer(without_code(text)) if urls else ():
        name = (link["name"] or link["label"]).lower()
        if name in urls:
            used.add(name)
            changes.append((*link.span(), f"{link['image']}[{text[slice(*link.span('label'))]}]({urls[name]})"))
    changes += [(*definition.span(), "") for definition in definitions if definition["name"].lower() in used]
    return changed(text, sorted(changes))


# -- cutting -----------------------------------------------------------------------------------------------------------


def rich_pieces(text: str) -> Iterator[str]:
    """Yield Kiro's Markdown in pieces that are rich messages of allowed size once they are made safe."""
    def safe_size(words: str) -> int:
        return len(SIGN.sub(safe_sign, words))

    return split_text(resolved(text), RICH_LIMIT, safe_size, RICH_SHORT, RICH_BLOCKS)


def split_text(text: str, limit: int, size: Callable[[str], int] = len, short: int = 0,
               cost: float = math.inf) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` by `size` and of at most that `cost`, and of at most `short` where there are
    blank lines: cut between paragraphs, else blocks, else lines, else words."""
    room, opening = limit - min(limit // 2, 2 * OPENING_AT_MOST), ""
    lines = list(short_lines(text, max(room // 10, 1)))
    sizes = {line.start: size(text[line.start:line.end]) + 3 for line in lines}      # two may be added, and a newline

    def measured(run: list[Line], most: int) -> float:
        """Return how much of `most` is needed for these lines."""
        return max(sum(sizes[line.start] for line in run), sum(line.cost for line in run) * most / cost)

    def packed(lines: list[Line], rank: int, most: int) -> Iterator[list[Line]]:
        """Yield lines in runs, cut before those of that rank or a better one; before others what is too large even so."""
        run, used = [], 0
        cuts = [n for n, line in enumerate(lines) if line.rank >= rank and n]
        for start, end in zip([0, *cuts], [*cuts, len(lines)]):
            unit = lines[start:end]
            if run and used + measured(unit, most) > most:
                yield run
                run, used = [], 0
            if rank and measured(unit, room) > room:
                *whole, unit = packed(unit, rank - 1, room)
                yield from whole
            run += unit
            used += measured(unit, most)
        yield run

    for run in packed(lines, 4, short or room):
        first, last = run[0], run[-1]
        piece = text[first.start:last.end]
        if first.number:
            piece = NUMBER.sub(str(first.number), piece, 1)
        if piece.strip():
            yield f"{opening}{piece}\n{last.closing}".strip("\n")
        opening = last.opening if len(last.opening) <= OPENING_AT_MOST else last.closing and last.closing + "\n"


def short_lines(text: str, width: int) -> Iterator[Line]:
    """Yield the lines of a text, those that are too long in several, cut at spaces."""
    for line in read(text):
        while line.end - line.start > width:
            cut = text.rfind(" ", line.start + width // 2, line.start + width) + 1 or line.start + width
            yield line._replace(end=cut)
            line = line._replace(start=cut, at=cut, rank=0, cost=0, number=0)
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
        for number in (signal.SIGINT, *STOP_SIGNALS):
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
    me = get_me(bot.telegram, TELEGRAM_SECONDS)
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
        incoming = Incoming(self._count, {"message_id": self._count, "text": line, "chat": {"id": CONSOLE_USER}})
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
        for name in ("get_session", "upsert_session", "set_model", "get_model", "delete_session", "get_facts", "set_facts",
                     "get_note", "set_note", "chosen_model", "unset_model"):
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
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: sys.exit(0))
        try:
            Console(bot).run()
        finally:
            bot.shut_down()
    return 0


# -- the check ---------------------------------------------------------------------------------------------------------

def check(settings: Settings) -> int:
    """Try everything once and print what was found; return 0 when all is well, else 1."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)     # as Ctrl-C: nothing is left behind
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
            if pid is not None and not runs_as_kiro(pid, settings):
                stale.append(f"{session_id} (process {pid})")
        fate = "removed at the next message" if store.get_note(LOCKS_BY_PID) else "unless of processes that can't be seen here"
    return f"stale, {fate}: {', '.join(stale)}" if stale else "none stale"


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
    umask = os.umask(0o077)
    folder = Path.cwd()
    try:
        settings = load_settings(folder, need_token=not options.console)._replace(umask=umask)
        set_up_logging(settings)
        warn_of_misspelt(folder / ".env")
        return check(settings) if options.check else console(settings) if options.console else serve(settings)
    except (SettingsError, StartError) as error:
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
