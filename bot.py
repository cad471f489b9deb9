"""A Telegram bot that gives every topic of a private chat its own Kiro CLI session.

    python bot.py              serve Telegram until SIGINT or SIGTERM
    python bot.py --check      try everything once, say what was found, exit 0 or 1
    python bot.py --console    talk to Kiro in this terminal, through the same conversation code
    python bot.py --tell USER/THREAD [TEXT]    leave a message for a topic: for cron, CI, a build that has finished

After the settings, a message travels through this file from top to bottom:

    Words          all that people read in a chat
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
again** and **Drop**.  *errand*: what is done away from the thread that asks for it, as a rule something short that talks to
Telegram.  *job*: what takes its place in the queue and is no prompt, such as /new.

Threads.  main: says what was found at the start, then waits for a signal, and every half second gives a sign of life to the
kernel, which ends a program that something has frozen.  poll: `Poll.run`; it waits for Telegram's getUpdates (and
deleteWebhook after a 409) and the database, nothing else.  errands: one for each topic that has commands to be answered,
while it has, and for those that have presses, one for each press to be acknowledged and each file to be downloaded, and at
the stop one that notes what
Kiro has said so far.  A conversation's own thread is an errand, too, for as long as it has work or a warm process; it alone
calls Kiro and sends drafts and answers.  keeper: one for each child process; it reads, writes, sees the process and what
that leaves behind to their end, and gives its place back.  timer: one for each thing that the journal did not take, and is
to be told again.

Locks, each held for a moment and never across a network call or a turn: `Conversation.lock` (what waits, the turn and its
phase, what is asked and decided), `Places._lock`, `Bot._lock` (the tables of conversations and errands),
`Bot.spawning` (no process starts unseen while the bot closes), and the database's own.  What is sent to Kiro is handed to its
keeper by adding to a buffer, which is one step.  Read without a lock, each a single value that is replaced as a whole:
`Bot.settings`, `Agent.models`, `commands` and `known`, `Kiro.open_prompt`, `Telegram.rich` and `drafts`, `Draft.stopped`,
`Questions.open`, `Delivery.sending` and `tries`, `Conversation.turn` and `changes`, `Turn.phase`; is there anything in
`Delivery.held`, in `Places._queue`, and of the last errand when the bot stops; for /status, what `Turn` and `Answer` tell;
what Kiro has said so far, when the bot stops; and when Telegram takes something again, where a lost race costs one frame or
one refusal.

Types stand at the public surface: functions and methods whose names begin with an underscore carry none; what may be anything,
and what returns nothing, says nothing.

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
import copy
import difflib
import faulthandler
import fcntl
import filecmp
import functools
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
import struct
import subprocess
import termios
import textwrap
import threading
import time
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import Future
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator, NamedTuple, Optional
from urllib.parse import quote, unquote

try:
    import requests
    import telebot
    import urllib3
    from dotenv.parser import parse_stream
    from telebot import apihelper, types, util
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
ALIKE = 0.85                    # of two names, by difflib; TELEGRAM_API_ID is less like TELEGRAM_API_URL


class SettingsError(Exception):
    """A setting is missing or bad; the text is one line that names it."""


class Settings(NamedTuple):
    """The settings of `.env`, checked, in the order of SETTINGS."""
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


def _words(text):
    """Split a command line; a relative path that exists becomes absolute, since Kiro runs in another folder."""
    words = shlex.split(text)
    for n, word in enumerate(words):
        if os.path.exists(word) if "/" in word else n and os.path.isfile(word):       # else the program is on the PATH
            words[n] = os.path.abspath(word)
    if words[:1] == ["python"] and not shutil.which("python"):
        words[0] = sys.executable
    return words


def _path(text):
    return Path(text).expanduser().resolve()


TOKEN_FORM = "what @BotFather gave you, such as 123456:ABC-DEF; put it into .env"
POSITIVE = r"[1-9]\d{0,7}(\.\d+)?", "a number of at least 1", float
SETTINGS = {                    # the default, the form as a pattern and in words, and what becomes of the text
    "BOT_TOKEN": ("", r"(\d+:[\w-]+)?", TOKEN_FORM, str),
    "ALLOWED_TELEGRAM_IDS": ("", r"(\b[1-9]\d{0,18}\b|[\s,])*", "numeric user ids (write to the bot to learn yours)",
                             lambda text: frozenset(map(int, re.findall(r"\d+", text)))),
    "KIRO_COMMAND": ("kiro-cli acp --agent-engine v2", ".+", "a command line", _words),
    "WORKSPACE_BASE_PATH": ("./workspaces/", ".+", "a folder", _path),
    "ALLOWED_FOLDERS": ("", r"[\s,]*([/~][^,]*(,[\s,]*|$))*", "absolute folders, separated by commas",
                        lambda text: [_path(part) for part in map(str.strip, text.split(",")) if part]),
    "MAX_PROCESSES": ("3", r"[1-9]\d{0,7}", "a whole number of at least 1", int),
    "WARM_SECONDS": ("300", r"\d{1,8}(\.\d+)?", "a number of at least 0", float),
    "TOOL_APPROVAL": ("ask", "ask|allow", "ask or allow", lambda text: text.lower() == "ask"),
    "SILENCE_SECONDS": ("600", *POSITIVE),
    "START_SECONDS": ("60", *POSITIVE),
    "RICH_MESSAGES": ("on", "on|off", "on or off", lambda text: text.lower() == "on"),
    "TRANSCRIBE_COMMAND": ("", ".*", "a command line", _words),
    "LOG_LEVEL": ("INFO", "debug|info|warning|error|critical", "DEBUG, INFO, WARNING, ERROR or CRITICAL", str.upper),
    "TELEGRAM_API_URL": (TELEGRAM_API, r"https?://[^\s/?#]+(/[^\s?#]*)?", "an http or https address",
                         lambda text: text.rstrip("/")),
}


def read_settings(env: dict[str, str]) -> Settings:
    """Return the settings found in `env`; relative paths are taken from the working directory.  Raises SettingsError."""
    values = []
    for name, (default, pattern, form, read) in SETTINGS.items():
        text = env.get(name, "").strip() or default
        if not re.fullmatch(f"(?ai:{pattern})", text):
            raise SettingsError(f"{name} must be {form}")
        try:
            values.append(read(text))
        except (ValueError, RuntimeError) as error:      # an open quote, ~nobody
            raise SettingsError(f"{name} can't be used: {error}") from error
    return Settings(*values, folder=Path.cwd())


class Redacted(logging.Formatter):
    """Log lines in which the bot's token can't appear, whatever brought it there [tg 5.6]."""

    secret = "\0"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return super().format(record).replace(self.secret, "<token>")


def set_up_logging(settings: Settings):
    """Log to stderr, ours and every library's, through the one formatter."""
    stderr = os.fstat(2)
    in_journal = os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"      # which notes the time by itself
    formatter = Redacted(("" if in_journal else "%(asctime)s ") + "%(levelname)s %(message)s")
    formatter.secret = settings.token.partition(":")[2] or formatter.secret
    logging.basicConfig(level=settings.log_level, force=True)
    logging.root.handlers[0].setFormatter(formatter)
    telebot.logger.disabled = True         # it tells nothing but what it raises, too, or at DEBUG every answer
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)     # it warns of every connection it closes
    threading.excepthook = lambda args: log.critical("A thread ended unexpectedly", exc_info=args[:3])


# ======================================================================================================================
# Words: all that people read in a chat, for whoever translates it.  {} are filled in, in this order; a failure begins with
# what happened and what to do about it, the technical words come on a line of their own
# ======================================================================================================================

# -- of Poll, the bot, Commands and Conversation -------------------------------------------------------------------------
STRANGER = "This bot is private. Your Telegram user id is {}; its owner can add it to ALLOWED_TELEGRAM_IDS."
UNREADABLE = "I couldn't read what you sent just now. Please send it in another way."
NOT_STORED = "⚠️ I can't store messages at the moment. Yours is safe with Telegram; I'll take it as soon as I can.\n{}"
# Telegram's menu and the console's /help; each is also in ANSWERS or JOBS, and HELP tells of it
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
KIROS_OWN = "\nKiro's own:"
UNSUPPORTED = "I can't pass on this kind of message. Send it as text or as a file."
TOLD = "⏰ From the server: {}"
TOO_LATE = "Your edit came too late: the message was taken as it was. Send the correction as a new message."
OVER = "This is over."
OK = "OK"
ASKED_AGAIN = "Asked again."
DROPPED = "Dropped."
REMOVE = "Remove: {}"
REMOVED = "Removed."
NOT_RUNNING = "Nothing is running."
NOT_SENT = "⚠️ /get PATH sends a file of this topic's folder, but {}."
HELD = "The answer is ready; Telegram does not take it, try {}. /stop gives it up."
WAITS = "Waiting: {}"
MORE_WAIT = "and {} more"
MODEL = "Model: {}"
CONTEXT = "Context used: {:.0f} %"
CREDITS = "Credits: {:.4g} in the last turn, {:.4g} in this session"
WHERE = "Session: {}\nTopic: {}/{}\nFolder: {}"
NONE_YET = "none yet"
NO_MODELS = "Kiro reports no models to choose from."
MODEL_CHOSEN = "Model for this topic: {}, from the next message on."
CHOOSE_MODEL = "Model for this topic: {}. Choose with /model NAME or here:"
NO_SUCH_MODEL = "Kiro has no model {!r}. The model stays {}. It offers: {}"
SEEN = "👀"
BUG = "⚠️ Something went wrong here. Your message is kept; I'll come back to it when I'm restarted, or send it again.\n{}"
NO_DATABASE = "⚠️ I can't use my database, so Kiro has to wait. I'll keep trying.\n{}"
TROUBLE = {"agent/not_found": "Kiro has no agent {requestedAgent!r} and uses {fallbackAgent!r}. "
                              "Whoever runs this bot can look at it.",
           "agent/config_error": "Kiro can't read an agent's configuration. Whoever runs this bot has to look at it.\n{error}",
           "mcp/server_init_failure": "ℹ️ The MCP server {serverName} could not be started; Kiro goes on without it. "
                                       "Whoever runs this bot can look at it.\n{error}"}
SIGN_IN = "The MCP server {} wants you to sign in at {}:\n{}"
SIGN_IN_AT = "Sign in at {}"
SIGN_IN_HINT = "\nIf the page can't be reached then, sign in once on the server: kiro-cli chat there."
ODD_ADDRESS = "an odd address"
ASKING = "Asking Kiro…"
NOT_PASSED_ON = "\nThe rest of your message was not sent to Kiro."
BACK = "Back to the former session"
NEW_SESSION = "✨ A new session has begun. Model: {}. Folder: {}"
GOING_ON = "✨ Going on with “{}”. Model: {}. Folder: {}"
WHICH_FOLDER = "Which {}?"
WORKS_IN = "This topic works in {}."
OWN_FOLDER = "This topic's own folder"
SESSIONS = "Sessions in {}:"
NO_SUCH_SESSION = "There is no such session here."
SESSION_TAKEN = "Another topic has that session: {}"
SOMEBODY_ELSES = "one of somebody else"
IN_TERMINAL = "Continue in a terminal"
FOR_TERMINAL = "The session is free for a terminal on the server:\n\n{}\n\nLeave it there before you write here."
COPY = "Copy"

# -- of Turn and Prompt --------------------------------------------------------------------------------------------------
THINKING = "Thinking…"
WRITING = "Kiro is writing"
SENDING = "Kiro is done; its answer is being sent"
STOPPING = "⏹ Stopping…"
TO_DECIDE = "❓ Waiting for your decision"
TOOL = "🔧 {}"
STOPPED = "⏹ Stopped."
STOPPED_BEFORE = "⏹ Stopped before Kiro began."
FAILED = "⚠️ {}"
FAULT = "⚠️ Something went wrong here. Ask again, or write something else.\n{}"
SILENT = "Kiro said nothing for {:.0f} s, so I ended it. Ask again, or write something else."
NOTHING_SAID = "Kiro has finished without saying anything."
STOP_REASONS = {"cancelled": "ℹ️ Kiro ended this turn early (cancelled).",
                "refusal": "ℹ️ Kiro declined to go on (refusal). Ask in other words, or /new starts afresh.",
                "max_tokens": "ℹ️ The answer was cut off: the model's token limit. Write “go on” to continue.",
                "max_turn_requests": "ℹ️ Kiro stopped: too many steps in one turn. Write “go on” to continue."}
LISTENING = "🎙 Listening…"
HEARD = "🎙 {}"
NO_FILE = "⚠️ I could not get a file, so Kiro does not have it. You can send it again.\n{}"
TAKES_TOO_LONG = "it was stopped, or takes too long"
NOT_HEARD = "🎙 The voice note could not be understood, so Kiro gets the file.\n{}"
CHOSEN = "→ {}"
REFUSED_SINCE = "→ Refused: {}."
TURN_OVER = "the turn is over"
BEING_STOPPED = "stopped"
NOT_ASKED = "⚠️ A question of Kiro's could not be shown, so it was refused. Ask Kiro to do it in another way.\n{}\n{}"
NOBODY_ANSWERED = "nobody answered for {:.0f} minutes"
ASKS = "❓ Kiro asks: {}"
DECLINED = "{}\nI declined: {}."
OPEN_ADDRESS = "{}\nIt wants you to open {}:\n{}"
OPEN = "Open {}"
WRITE_IT = "Your next message is the answer: {}."
DOES_NOT_FIT = "⚠️ That does not fit.\n{}"
WRITTEN = {"string": "a text", "integer": "a whole number", "number": "a number",
           "array": "one or more of {}, with commas between"}
LIMITS = {"minimum": "from {}", "maximum": "up to {}",
          "minLength": "at least {} characters", "maxLength": "at most {} characters",
          "pattern": "of the form {}", "format": "of the form {}"}
YES, NO, DONE, SEND, DECLINE, SKIP = "Yes", "No", "Done", "Send", "Decline", "Skip"
NOT_HTTPS = "{} is no plain https address"
NO_SECRETS = "this chat is no place for secrets; give it on the server"
NOT_SHOWN = "such a question can't be shown here"

# -- of Agent and Kiro ---------------------------------------------------------------------------------------------------
REFUSED = "Kiro reports a problem.\n{}"
FOLDER_REFUSED = "{} is missing, can't be read, or is not among the allowed folders.\n{}"
NO_FOLDERS = "Whoever runs this bot can allow other folders with ALLOWED_FOLDERS."
NEARLY_FULL = "ℹ️ {:.0f} % of this session's context is used. /compact shortens it, /new starts afresh."
SESSION_REFUSED = "Kiro no longer opens that session, so this topic stays in its own."
WAITING = "Waiting for a free place (ahead of you: {})…"
NO_START = "Kiro could not be started. Whoever runs this bot has to look at KIRO_COMMAND on the server.\n{}: {}"
NO_END = "The former Kiro process does not end. Whoever runs this bot has to look at it."
NO_ANSWER = "Kiro did not answer in time.\n{}: no answer within {:.0f} s"
DEAF = "Kiro does not read what it is sent."
FOLDER_GONE = "This topic's folder can't be used. Whoever runs this bot has to look at it; /folder offers others.\n{}: {}"
NO_HISTORY = "ℹ️ This agent can't reload sessions: each message starts without the history."
NOTHING_KEPT = "ℹ️ Kiro kept nothing of what was said here before, so it starts afresh.\nThe old session: {}"
HISTORY_GONE = ("⚠️ Kiro no longer has this topic's session: its history is gone, a new one has begun. "
                "The folder is as it was.\nThe old session: {}")
OPEN_ELSEWHERE = "This topic's session is open in another program (process {}). Close it there, then ask again."
STILL_LOCKED = ("This topic's session is still locked. Ask again in a minute, or begin another with /new. If nothing uses it, "
                "whoever runs this bot can remove the lock.\nprocess {}: {}")
MODEL_GONE = "ℹ️ The model {} is no longer offered; this topic is back to Kiro's own choice."
MODEL_REFUSED = "⚠️ The model may not be {}; /model offers others. {}"
LOG_IN = "It is not logged in. On the server, as the bot's user: {}"
KIRO_LOGIN = "kiro-cli login --use-device-flow (or set KIRO_API_KEY); another agent as its documentation says."
TRY_AGAIN = "Ask again; if that does not help, /new starts afresh."
WAIT_A_LITTLE = "It may pass. Wait a little, then ask again."
REFUSES_ALL = "This session refuses every message in the same way. /new starts a fresh one, /compact may help too."
EXITED = "Kiro has exited. If it does so every time, whoever runs this bot has to look at it.\n{}"

# -- of Answer and Reply -------------------------------------------------------------------------------------------------
COMPACTION = {"started": "Compacting the conversation…", "completed": "The conversation was compacted.",
              "failed": "⚠️ The conversation could not be compacted; /new starts afresh.\n{}"}      # by Kiro's word for it
TRIES_AGAIN = "Kiro is held up, and tries again"
SOME_TOOL = "use a tool"
STEPS, FILES = ("{} step", "{} steps"), ("{} file", "{} files")      # one, more
COST = "{:.4g} credits", "{:.4g} credits"
STEP = "step {}"
WANTS_TO = "❓ Kiro wants to: {}"
TOO_LONG = "⚠️ This answer became far too long; the rest is left out. Ask Kiro for less at a time."
MORE_TEXT = "\n⚠️ {} more characters are not shown."
MORE_STEPS = "… {} more"
NOT_TAKEN = "⚠️ Telegram does not take a part of the answer. I'll keep trying; /stop gives it up.\n{}"
GIVEN_UP = "⏹ I have given up the part of the answer that Telegram does not take. Kiro knows it; you can ask for it."
ASK_AGAIN, DROP, CHANGES = "Ask again", "Drop", "Changes"
FILE_NOT_SENT = "⚠️ Kiro wanted to send {}, but {}."
NO_SUCH_FILE = "there is no such file"
CANT_BE_SENT = "it can't be sent.\n{}"
WORKED_ON = "⚠️ I was interrupted while working on: {}"
ONLY_A_FILE = "(a file)"
LEFT_OUT = "✂️ {} messages are left out here: this is the whole answer."
TOPIC_GONE = "⚠️ The topic is gone or closed, so I answer here.\n{}"
TOO_LARGE = "It is larger than the {} MB that Telegram takes"
OUTSIDE = "It is outside of this topic's folder"
NOT_REGULAR = "It is not a regular file"


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
EMPTY_SECONDS = 1               # between two empty answers; some servers give them at once
EDIT_SECONDS = 2 * 60           # how long after it was written a message can become a /stop


class Poll:
    """Fetch updates and hand them over.  Its thread waits for Telegram and the database only."""

    def __init__(self, bot):
        self._bot = bot
        self._strangers = set()                # who was told their id
        self._env = b""                        # what `.env` says
        self._batch = []                       # (incoming, its row, the state of an edited one's old version)
        self._update, self._message = {}, None     # in hand, and the message in it
        self._told_of_trouble = set()          # topics, as (user, thread), until the journal can be written again
        self._telebot = telebot.TeleBot(bot.settings.token, threaded=False)
        for kind, handler in zip(ALLOWED_UPDATES, (self._on_message, self._on_message, self._on_press, self._on_stop)):
            # no filters, since the gate decides
            getattr(self._telebot, f"add_{kind}_handler")({"function": handler, "filters": {}})

    def run(self):
        """Poll until the bot closes.  The next poll's offset is what tells Telegram that a batch was received [tg 5.5]."""
        bot, offset, failures, conflicts = self._bot, None, 0, 0
        while not bot.closing.is_set():
            asked_at = time.monotonic()
            try:
                for row in bot.store.take_told():          # by bot.py --tell, on this machine
                    if row.user_id in bot.settings.allowed:
                        bot.attempt(take_told, bot, row)
                updates = bot.telegram.call(apihelper.get_updates, offset=offset, timeout=10,
                                            long_polling_timeout=POLL_SECONDS, allowed_updates=ALLOWED_UPDATES)
                self._look_at_env()
                self._take(updates)
                offset = max((update["update_id"] + 1 for update in updates), default=offset)
                if failures:
                    log.info("Polling again")
                failures = conflicts = pause = 0
                if not updates:
                    bot.attempt(bot.store.purge)
                    pause = asked_at + EMPTY_SECONDS - time.monotonic()
            except Unauthorized:
                return bot.quit(1, "Telegram no longer accepts BOT_TOKEN (401): get the current one from @BotFather")
            except Conflict as error:      # another bot's poll, one of our own that lingers, or a webhook
                log.error("%s", error)
                conflicts += 1
                if conflicts > CONFLICTS_AT_MOST:
                    return bot.quit(1, f"Giving up: {error}")
                pause = CONFLICT_SECONDS[conflicts > 1]
                if "webhook" in str(error):
                    log.warning("Removing the webhook that was set for this bot, since it polls")
                    bot.attempt(bot.telegram.call, apihelper.delete_webhook)
                    pause = 0
            except (TelegramError, StoreError) as error:
                pause = retry_delay(failures, error)
                log.log(logging.DEBUG if failures else logging.WARNING, "Messages can't be polled: %s", error)
                failures += 1
            bot.closing.wait(max(0, pause))

    def _look_at_env(self):
        """Take over who may use the bot, when `.env` has changed."""
        settings, path = self._bot.settings, Path(".env")
        try:
            content = path.read_bytes() if path.exists() else self._env
            if content == self._env:
                return
            self._env = content
            allowed = load_settings().allowed
        except (OSError, SettingsError) as error:
            return log.error("Who may use the bot stays as it was: %s", error)
        if allowed != settings.allowed:
            self._bot.settings = settings._replace(allowed=allowed)
            log.info("Allowed from now on: %s", _describe_allowed(self._bot))

    def _take(self, updates):
        """Journal and hand over a batch.  Raises StoreError: it is not to be acknowledged."""
        batch = self._batch = []
        for update in updates:
            self._dispatch(update)
        last = {incoming.key: incoming for incoming, _, _ in batch}
        try:
            new = self._bot.store.receive(
                [row for _, row, state in batch if state is None],
                [row for incoming, row, state in batch if state is not None and incoming.command not in OWN])
        except StoreError as error:
            for key in last.keys() - self._told_of_trouble:
                self._told_of_trouble.add(key)
                self._bot.tell(key, NOT_STORED.format(error))
            raise
        self._told_of_trouble.clear()
        for incoming, row, state in batch:
            incoming.followed = last[incoming.key] is not incoming
            if state is not None:
                self._bot.attempt(take_edit, self._bot, incoming, state)
            elif row.update_id in new:
                self._bot.attempt(route, self._bot, incoming)

    def _dispatch(self, update):
        """Parse one update and let its handler look at it; whatever is wrong with it stays with it."""
        self._update = update
        try:
            self._message = _message_in(update)
            self._telebot.process_new_updates([types.Update.de_json(_plain(update))])
        except StoreError:
            raise
        except Exception as error:   # whatever is in it; a bad update must not stop the others
            log.error("Update %s can't be read and is left out: %r", update["update_id"], error)
            self._apologize()

    def _apologize(self):
        """Tell an allowed user where they wrote that it was left out, if that much of it can be read."""
        message = self._message
        try:
            if self._lets_in(self._update.get("callback_query", message)["from"], message["chat"]):
                self._bot.tell((message["chat"]["id"], thread_of(message)), UNREADABLE)
        except (KeyError, TypeError, AttributeError):
            pass

    # -- the gate: first of all, who and where -------------------------------------------------------------------------

    def _lets_in(self, sender, chat):
        """Only allowed users in their own private chat; in a group others would read the answers."""
        return chat["type"] == "private" and chat["id"] == sender["id"] and sender["id"] in self._bot.settings.allowed

    def _tell_stranger(self, message):
        """Tell a stranger their id, once; that is how an owner learns it."""
        stranger = message["from"]["id"]
        if stranger == message["chat"]["id"] and stranger not in self._strangers:      # not in a group; nor the bot itself
            log.info("A stranger wrote: user %s", stranger)
            self._bot.chat(stranger, thread_of(message)).say(STRANGER.format(stranger), seconds=0)
            self._strangers.add(stranger)

    # -- handlers: they look, and say what is to be done once the batch is in the journal ---------------------------------

    def _on_message(self, _):
        """A message, or a new version of one."""
        update, message = self._update, self._message
        if not self._lets_in(message["from"], message["chat"]):
            return self._bot.errand("strangers", self._tell_stranger, message) if "message" in update else None
        if message.keys() & util.content_type_service and not self._is_named(message):
            return
        ids = update["update_id"], message["chat"]["id"], thread_of(message), message["message_id"]
        struct.pack("4q", *ids)                # raises for what the database would not take
        row, state = InboxMessage(*ids, json.dumps(update)), None
        incoming = Incoming(row)
        if "edited_message" in update:
            body, state = self._bot.store.find_message(row.user_id, row.message_id)
            if "location" in message or body and contents(_message_in(json.loads(body))) == contents(incoming.message):
                return                         # it moves, or got a reaction, or a link preview [tg 7]
        self._batch.append((incoming, row, state))

    def _is_named(self, message):
        """Note what is told of a topic's name; return whether somebody gave it to a new one, as it may be a folder's."""
        created = message.get("forum_topic_created", {})
        name = created["name"] if created.get("is_name_implicit") else ""
        if created or "forum_topic_edited" in message:
            self._bot.conversation(message["chat"]["id"], thread_of(message)).implicit_name = name
        return created and not name and self._bot.settings.allowed_folders

    def _on_press(self, press):
        """A press needs no journal: it counts at once, and on a full disk too."""
        sender, message = self._update["callback_query"]["from"], self._message
        if message:
            press.message.json = message
        if self._lets_in(sender, message["chat"] if message else {**sender, "type": "private"}):
            self._bot.attempt(take_press, self._bot, press)

    def _on_stop(self, stop):
        """The Stop button of a draft: there is no sender, the chat decides [tg 1.3]."""
        chat = self._update["stopped_message_generation"]["chat"]
        if self._lets_in(chat, chat):
            self._bot.attempt(stop_draft, self._bot, chat["id"], stop.draft_id)


def _plain(part):
    """Return an update, or a part of one, with only the fields that telebot is asked for: it stumbles over what it does not
    know, in quotes and forwards too [tg 1.3, 7]."""
    return {name: _plain(value) if name in ALLOWED_UPDATES else value for name, value in part.items() if name in FIELDS}


def _message_in(update):
    """Return the message of an update, or the one whose button was pressed."""
    return update.get("message") or update.get("edited_message") or update.get("callback_query", {}).get("message")


class Incoming:
    """A message that a conversation is to handle."""

    def __init__(self, row):
        """Read a message of the journal; without what it quotes, if that can't be read.  Raises anything when its own words
        can't."""
        message = _message_in(json.loads(row.body))
        try:
            full_text(message), files_of(message)
        except Exception:   # something new
            message = {name: value for name, value in message.items() if name not in NESTED} | {"quote": UNREAD}
            contents(message)
        self.update_id = row.update_id
        self.message = message                 # as Telegram sent it
        self.arrived = time.monotonic()
        self.files = None                      # once they are downloaded: path in the workspace, what is said of it
        self.followed = False                  # by another that came with it
        text = "" if "forward_origin" in message else message.get("text", "")     # what somebody else wrote commands nothing
        if "forum_topic_created" in message:       # a folder's name, maybe
            text = f"/folder {message['forum_topic_created']['name']}"
        match = re.match(r"/([A-Za-z0-9_-]+)(?:@\w+)?(?!\S)\s*(.*)", text, re.DOTALL)
        self.command, self.argument = (match[1].lower(), match[2].strip()) if match else ("", "")

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
        if self.followed or "forward_origin" in self.message or file_in(self.message):
            return REST_SECONDS
        return 0


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

    def __init__(self, settings: Settings, store: SessionStore):
        self.settings = settings
        self.store = store
        self.closing = threading.Event()       # no new turns, no repeats
        self.exit_status = 0
        self.help = HELP
        self._bell, self.bell_handle = os.pipe()   # main waits for a byte: a lock would not always let a signal through
        self.telegram = Telegram(settings, self.closing)
        self.places = Places(settings.max_processes)
        self.processes = set()                 # Kiro processes, started and not gone; each has a keeper that ends it
        self.spawning = threading.Lock()       # so that none is started unseen while the bot closes
        self.conversations = {}                # by (user, thread); made in `conversation`
        self._lock = threading.Lock()          # guards that, and the next
        self._errands = {}                     # a deque of functions for each key; those of one key run one after the other

    def chat(self, user_id: int, thread_id: int) -> Topic:
        """Return a way to speak in this topic."""
        return Topic(self.telegram, user_id, thread_id)

    def conversation(self, *key: int) -> Conversation:
        """Return the conversation of this (user, thread), made when there was none."""
        with self._lock:
            if key not in self.conversations:
                self.conversations[key] = Conversation(self, key)
            return self.conversations[key]

    def errand(self, key, action: Callable, *args, **kwargs):
        """Do something away from the calling thread.

        Errands of one key, a topic for one, run in order and take one thread at most, so that none holds up the others.
        """
        with self._lock:
            mine = self._errands.get(key, deque())
            mine.append(lambda: action(*args, **kwargs))
            if len(mine) == 1:
                threading.Thread(target=self._run_errands, args=(key, mine), name="errand", daemon=True).start()
                self._errands[key] = mine      # not if there is no thread to be had

    def _run_errands(self, key, mine):
        while mine:
            self.attempt(mine[0])
            with self._lock:
                mine.popleft()
                if not mine:
                    del self._errands[key]

    def attempt(self, action: Callable, *args):
        """Do something whose failure must not keep others from what comes after it."""
        try:
            action(*args)
        except Closing:
            pass
        except (TelegramError, StoreError) as error:
            log.warning("Not done: %s", error)
        except Exception:   # a bug
            log.exception("Something was not done")

    def tell(self, key: tuple[int, int], text: str, *buttons, silent: bool = False):
        """Say something in a topic, without waiting for it; a draft that it hides is sent anew."""
        conversation = self.conversation(*key)
        self.errand(key, conversation.chat.say, text, *buttons, silent=silent)
        self.errand(key, conversation.post, "wake")

    def take(self, row: InboxMessage):
        """Take on a journaled message.  Raises anything when it can't be read."""
        route(self, Incoming(row))

    def say_as(self, user_id: int, thread_id: int, text: str):
        """Take on a text as if the user had written it in this topic: what a button stands for, in the journal like it.

        Raises StoreError.
        """
        self.take(self.store.receive_own(user_id, thread_id, own_update(user_id, thread_id, text)))

    def note(self, write: Callable, *args):
        """Write into the journal, late rather than never."""
        try:
            write(*args)
        except StoreError as error:
            log.error("What was done can't be journaled (%s): %s", write.__name__, error)
            again = threading.Timer(JOURNAL_RETRY_SECONDS, self.note, (write, *args))
            again.daemon = True
            again.start()

    def quit(self, status: int, reason: str):
        """End the program with this exit status."""
        log.error("%s", reason)
        self.exit_status = status
        os.write(self.bell_handle, b"!")

    def rings(self, seconds: float) -> bool:
        """Wait until the program should end, at most so long; say whether it should."""
        return bool(select.select([self._bell], [], [], seconds)[0])

    def recover(self):
        """Take up what a former run left: its processes, unfinished turns, and the messages that still wait.

        The processes first and at once: while one works, its turn must not be offered again.  That takes a listing of /proc,
        and seconds only if some process holds out against TERM.
        """
        end_orphans(self.settings.folder)
        for turn in self.store.unfinished():
            if turn.user_id in self.settings.allowed:
                self.attempt(self.note, self.conversation(turn.user_id, turn.thread_id).finish_turn, turn)
        for row in self.store.waiting():
            if row.user_id in self.settings.allowed:
                self.attempt(self.take, row)

    def shut_down(self):
        """Within two seconds: cancel and end of stdin for all children, TERM, KILL; keep what was said for the cards."""
        self.closing.set()
        began, conversations = time.monotonic(), list(self.conversations.values())
        if self.spawning.acquire(timeout=0.5):  # whoever was starting a process has listed it, unless the disk hangs
            self.spawning.release()
        for kiro in list(self.processes):
            kiro.cancel()
            kiro.end()
        for conversation in conversations:     # aside: the database may be locked by somebody for longer than we have
            self.attempt(self.errand, "last words", conversation.keep_partial)
        for deadline, grace in ((1.0, 0.4), (1.8, 0)):
            # also while a part is on its way: a stop between its arrival and its tick would send it twice
            while (self.processes or "last words" in self._errands or any(c.delivery.sending for c in conversations)
                   ) and time.monotonic() - began < deadline:
                time.sleep(0.01)
            end_processes(lambda pid: is_ours(pid) or any(kiro.owns(pid) for kiro in list(self.processes)), grace)


# ======================================================================================================================
# Commands: what the bot answers itself
# ======================================================================================================================

FROM_SERVER = "[From the server, not from the user:]\n"
OFFER = {"again": ("waiting", ASKED_AGAIN), "drop": ("done", DROPPED)}     # what becomes of an offered turn's messages
THIS_RUN = secrets.token_hex(4)     # tells this run's questions from those of former ones
STATUS_WORDS, STATUS_WAITING = 40, 8     # characters of a waiting message, and how many, that /status shows


# -- on the poll thread: look and hand over; what takes time is an errand ------------------------------------------------

def route(bot: Bot, incoming: Incoming):
    """Hand a journaled message to whoever answers it."""
    key, command, message = incoming.key, incoming.command, incoming.message
    conversation, is_written = bot.conversation(*key), incoming.update_id >= 0 and not command
    is_answered = command in ANSWERS and (command not in JOBS or conversation.agent.models.offered)
    if (command == "stop" and conversation.stop()      # at once: errands of the topic may be waiting
            or is_written and conversation.questions.hear(message.get("text", ""))):
        bot.errand(key, bot.note, bot.store.done, incoming.update_id)      # what stops says so, when it is true
    elif not is_answered and (command in JOBS or any(contents(message))):
        conversation.add(incoming)
    else:
        bot.errand(key, conversation.answer, incoming, ANSWERS.get(command, _unsupported))


def take_told(bot: Bot, row: InboxMessage):
    """Take on a message that `bot.py --tell` has left, and show what Kiro is asked."""
    incoming = Incoming(row)
    text = counted(incoming.message["text"].removeprefix(FROM_SERVER))
    bot.tell(incoming.key, TOLD.format(text), silent=True)
    route(bot, incoming)


def take_edit(bot: Bot, incoming: Incoming, state: str):
    """A message was edited: as long as it waits, or is `offered`, it goes as edited."""
    conversation, message = bot.conversation(*incoming.key), incoming.message
    if incoming.command == "stop" and message["edit_date"] - message["date"] <= EDIT_SECONDS:
        conversation.stop()
    if incoming.command in OWN:                # no better version of a message; it stays as it was
        return
    if not conversation.edit(incoming) and state not in ("", "offered"):
        bot.tell(incoming.key, TOO_LATE)


def stop_draft(bot: Bot, user_id: int, draft_id: int):
    """The Stop button of a draft; only the running turn's own draft counts."""
    for key, conversation in list(bot.conversations.items()):
        if key[0] == user_id:
            conversation.stop(draft_id)


def take_press(bot: Bot, press: types.CallbackQuery):
    """A button: data that this bot didn't make does nothing."""
    data = press.message and press.data or ""
    for pattern, action in PRESSES.items():
        if match := re.fullmatch(pattern, data, re.ASCII):
            return bot.errand((press.from_user.id, match[1]), action, bot, press, *match.groups())     # in order
    _acknowledge(bot, press, OVER)


# -- what a press does ---------------------------------------------------------------------------------------------------

def _decide(bot, press, thread_id, token, index):
    choice = bot.conversation(press.from_user.id, int(thread_id)).questions.decide(token, int(index))
    is_former = not token.startswith(THIS_RUN)     # else whoever decided it edits the message
    _acknowledge(bot, press, choice or OVER, settles=is_former)


def _settle_offer(bot, press, choice, turn_id):
    state, text = OFFER[choice]
    rows = bot.store.drop(int(turn_id), press.from_user.id, then=state)
    for row in rows if state == "waiting" else ():
        bot.take(row)
    _acknowledge(bot, press, text if rows else OVER, settles=True)


def _say(bot, press, thread_id, command):
    bot.say_as(press.from_user.id, int(thread_id), command)
    _acknowledge(bot, press, OK)


def _acknowledge(bot, press, text, settles=False):
    """Answer the press, first of all, as Telegram lets it expire [tg 3.1].  If that `settles` its message, take the buttons off
    there, and say what became of it; not when somebody made the press up, and the message has no such button."""
    user_id, message = press.from_user.id, press.message
    bot.errand(press.id, bot.telegram.call, apihelper.answer_callback_query, press.id, text[:200], chat=user_id)
    if settles and press.data in str(message.json.get("reply_markup")):
        bot.chat(user_id, 0).settle(message.message_id, paragraphs(message.json.get("text"), text))


PRESSES = {r"ask:(\d{1,18}):([0-9a-f]{16}):(\d{1,3})": _decide,      # by data, with groups
           r"(again|drop):(\d{1,18})": _settle_offer,
           r"say:(\d{1,18}):(/(?:model|folder|sessions|terminal|remove|changes) [0-9a-f]{16})": _say}


# -- what a command is answered: a text, and the buttons below ----------------------------------------------------------

def _unsupported(*_):
    """Answer what can't be passed on."""
    return UNSUPPORTED, []


def _show_help(conversation, _):
    """Answer /help."""
    theirs = conversation.agent.commands
    return "\n".join([conversation.bot.help, *(theirs and [KIROS_OWN, *theirs])]), []


def _stop_sending(conversation, _):
    """Answer /stop when no turn is running."""
    if not conversation.delivery.held:
        return NOT_RUNNING, []
    conversation.post("give_up")
    return "", []


def _get_file(conversation, path):
    """Answer /get: send a file of the topic's folder, as Kiro can."""
    try:
        refusal = conversation.delivery.upload({"path": path, "caption": ""}, silent=False)
    except TelegramError as error:
        refusal = CANT_BE_SENT.format(error)
    return NOT_SENT.format(refusal) if refusal else "", []


def _show_status(conversation, _):
    """Answer /status: what concerns people first, with buttons that take back what waits."""
    agent, delivery, record = conversation.agent, conversation.delivery, conversation.agent.record()
    known = agent.known
    with conversation.lock:
        turn, waiting = conversation.turn, list(conversation.waiting)
    shown = {str(incoming.update_id): one_line(words(incoming.message), STATUS_WORDS) for incoming in waiting[:STATUS_WAITING]}
    lines = [turn.status(), *plan_lines(turn.answer.plan)] if turn else [NOT_RUNNING]
    if delivery.held:
        lines.append(HELD.format(delivery.tries + 1))
    lines += map(WAITS.format, shown.values())
    if len(waiting) > STATUS_WAITING:
        lines.append(MORE_WAIT.format(len(waiting) - STATUS_WAITING))
    lines.append(MODEL.format(agent.model()))
    if known.context:
        lines.append(CONTEXT.format(known.context))
    if known.credits is not None:
        lines.append(CREDITS.format(known.credits, known.spent))
    lines.append(WHERE.format(record.session_id or NONE_YET, *conversation.key, record.workspace_path))
    buttons = choices(conversation, "remove", ((name, REMOVE.format(text)) for name, text in shown.items()))
    return "\n".join(lines), buttons + session_button(conversation, "terminal", IN_TERMINAL)


def _remove(conversation, wanted):
    """Take back a waiting message: /status has a button for each."""
    removed = conversation.remove(wanted)
    if removed:
        conversation.bot.note(conversation.store.done, removed.update_id)
    return REMOVED if removed else OVER, []


def _show_changes(conversation, wanted):
    """Show what the last turn did to files: its answer has a button for that."""
    changes = conversation.changes.get(chosen(wanted, conversation.changes))
    if changes:
        conversation.chat.show_diff(changes)
    return "" if changes else OVER, []


def _answer_model(conversation, wanted):
    """Choose a model, or list them when none is wanted."""
    agent = conversation.agent
    if not agent.models.offered:                       # so it is a job, and may ask Kiro
        agent.ready()
    names, present = agent.models.offered, agent.model()
    if not names:
        return NO_MODELS, []
    if name := chosen(wanted, names):
        conversation.store.set_model(*conversation.key, name)
        return MODEL_CHOSEN.format(name), []
    text = CHOOSE_MODEL.format(present)
    if wanted:
        text = NO_SUCH_MODEL.format(wanted, present, ", ".join(names))
    return text, choices(conversation, "model", [*names.items()][:MODELS_SHOWN], present)


ANSWERS = {"start": _show_help, "help": _show_help, "stop": _stop_sending, "status": _show_status, "get": _get_file,
           "remove": _remove, "changes": _show_changes,
           "model": _answer_model}        # by command: what needs no place in the queue; a model does until Kiro told them


def _key_of(name):
    """Return 16 hex digits for a path or an id, which may not fit into a button's 64 bytes [acp 11]."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def choices(conversation: Conversation, command: str, options: Iterable[tuple[str, str]], present: str = "") -> Buttons:
    """Return a button for each (name, label), which stands for the command with this name's key."""
    prefix = f"say:{conversation.key[1]}:/{command}"
    return [[("✓ " * (name == present) + label, f"{prefix} {_key_of(name)}")] for name, label in options]


def session_button(conversation: Conversation, command: str, label: str) -> Buttons:
    """Return a button for the session that the topic has, none when nothing was said in it."""
    record = conversation.agent.record()
    said = record.session_id and conversation.store.get_facts(record.session_id).ended
    return choices(conversation, command, [(record.session_id, label)] if said else [])


def chosen(wanted: str, names: Iterable[str]) -> Optional[str]:
    """Return the name that is wanted, given by itself or by its key."""
    return next((name for name in names if wanted in (name, _key_of(name))), None)


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


class Conversation:
    """What belongs to one (user, thread): what waits, the turn, the process.

    Any thread may call `add`, `edit`, `stop`, `remove` and `post`, which return at once, `finish_turn` and `keep_partial`,
    which use the database, and `answer`, which waits for Telegram.  Everything else runs on the conversation's own thread,
    which exists while there is work or a warm process.
    """

    def __init__(self, bot: Bot, key: tuple[int, int]):
        self.bot, self.store, self.chat, self.key = bot, bot.store, bot.chat(*key), key
        self.lock = threading.Lock()            # guards the next two, and the turn's phase
        self.waiting = deque()                  # messages: Incoming
        self.turn: Optional[Turn] = None        # there is one whenever something waits or runs
        self._events = queue.SimpleQueue()      # of what the thread is to call
        self.agent = Agent(self)
        self.delivery = Delivery(self)
        self.questions = Questions(self)
        self._warm_until = 0.0
        self.notes = Notes()
        self.implicit_name = ""                 # of a topic that nobody has named
        self.changes = {}                       # what the last turn did to files, as text, by turn; replaced as a whole

    # -- for all threads -----------------------------------------------------------------------------------------------

    def post(self, event: str, *args):
        """Have the conversation's thread call this `_on_` method."""
        self._events.put(functools.partial(getattr(self, f"_on_{event}"), *args))

    def add(self, incoming: Incoming):
        """Take on a message."""
        with self.lock:
            has_to_wait = self.turn and self.turn.turn_id and not self.waiting     # the first of a burst tells enough
            self.waiting.append(incoming)
            if self.turn is None:
                self.bot.errand(self, self._run)
                self.turn = Turn(self)
        self.post("wake")
        if has_to_wait and (message_id := incoming.message["message_id"]):
            self.bot.errand(self.key, self.chat.react, message_id, SEEN)

    def finish_turn(self, turn: UnfinishedTurn):
        """Take on a former run's turn: what is missing is sent, what was cut off is offered; it never runs again unasked.

        Raises StoreError.
        """
        is_answered = turn.state == "answered"     # else it was cut off
        if not is_answered:
            self.store.answer(turn.turn_id, [json.dumps(part) for part in self.delivery.card(turn)], offer=True)
        parts = [json.loads(body) for body in self.store.parts(turn.turn_id)]
        is_tried = is_answered and parts and parts[0]["kind"] == "answer"      # to be formatted; not behind an unsent note
        outgoing = Outgoing(turn.turn_id, parts, turn.offer or not is_answered, former=is_tried)
        self.bot.errand(self, self.delivery.send, outgoing)
        self.bot.errand(self, self.bot.errand, self, self._run)        # behind the other turns: it may run for long

    def edit(self, incoming: Incoming) -> bool:
        """Replace a waiting message by its edited version; return False when it does not wait."""
        with self.lock:
            for n, old in enumerate(self.waiting):
                if old.message["message_id"] == incoming.message["message_id"]:
                    incoming.update_id = old.update_id
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
                turn.stop()
            turn.draft.stopped |= draft_id is not None
        self.post("wake")
        return True

    def remove(self, wanted: str) -> Optional[Incoming]:
        """Take a waiting message back, and return it; None when it does not wait any more."""
        with self.lock:
            removed = next((incoming for incoming in self.waiting if chosen(wanted, [str(incoming.update_id)])), None)
            if removed:
                self.waiting.remove(removed)
                if not self.waiting and not self.turn.messages:
                    self.turn.stop()               # there is nothing left to do for it
        self.post("wake")
        return removed

    def answer(self, incoming: Incoming, respond: Callable):
        """Answer a command.  It is done also if that can't be said: it must not be done again at the next start."""
        text, buttons = respond(self, incoming.argument)
        try:
            if text:
                self.chat.say(text, buttons)
                self.post("wake")
        except TelegramError as error:
            log.error("What became of /%s of %s/%s can't be said: %s", incoming.command, *self.key, error)
        self.bot.note(self.store.done, incoming.update_id)

    def keep_partial(self):
        """Keep what Kiro has said in a turn that is being cut off, for the card at the next start."""
        turn = self.turn
        if turn and turn.turn_id:              # also one that is over: its answer may not be journaled yet
            self.bot.note(self.store.keep_partial, turn.turn_id, turn.answer.text())

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self):
        """Work as long as there is a reason to.  What comes later makes for another run: the next errand of its kind."""
        agent, closing = self.agent, self.bot.closing
        while (self.waiting or self.turn or self.delivery.held or agent.kiro or agent.former) and not closing.is_set():
            self.bot.attempt(self._step)

    def _step(self):
        """Do the next piece of work; whatever goes wrong with it must not stop those that follow."""
        turn = self.turn
        try:
            if turn:
                self._serve(turn)
            elif time.monotonic() >= self.delivery.try_at:
                self.delivery.try_again()
            else:
                self._idle()
        except (NoPlace, Closing):
            pass
        except Stopped:                        # while the next process was being started, or the database awaited
            self.agent.let_go(at_once=True)
        except Exception as error:   # a warm process; or a bug: the topic must hear of it, and the next message must work
            log.error("Conversation %s/%s: %s", *self.key, error, exc_info=not isinstance(error, (StoreError, KiroFailure)))
            self.agent.let_go(at_once=True)
            if turn and turn is self.turn:
                self._give_up(turn, error)

    def _give_up(self, turn, error):
        """A turn has failed in an unforeseen way."""
        with self.lock:
            self.move(turn)
        self._close(turn)
        self.bot.tell(self.key, BUG.format(error))

    def _await_store(self, turn, error):
        """The database can't be used: nothing has begun, the messages wait on, and the next step tries again."""
        with self.lock:
            turn.check_stop()                  # it means its messages, and needs no database
            self.waiting.extendleft(reversed(turn.messages))
            turn.messages = []
        turn.doing = NO_DATABASE.format(error)
        until = time.monotonic() + JOURNAL_RETRY_SECONDS
        while time.monotonic() < until:
            self.pump(until)                   # also when a job is next: `wait` would raise Stopped
            turn.check_stop()
        turn.doing = THINKING

    def _serve(self, turn):
        """Do what waits longest."""
        self.agent.take_back()
        with self.lock:
            job = self._next_job()
            if job:
                self.move(turn)
        try:
            if job:
                self.answer(job, _do)
            elif outcome := turn.run():
                self._conclude(turn, outcome)
        except StoreError as error:
            return self._await_store(turn, error)
        self._close(turn)
        if not (self.turn or job and job.command == "terminal"):       # the turn starts what it needs; a terminal has it now
            self._warm_up()

    def _close(self, turn):
        """The turn is over; whatever waits gets the next one."""
        turn.end()
        with self.lock:
            self.turn = Turn(self) if self.waiting else None

    def _idle(self):
        """Keep the process ready for a message until it was kept long enough, or its place is needed; await others' end."""
        kiro, until = self.agent.kiro, self.delivery.try_at
        if kiro:
            if kiro.exit_noticed or time.monotonic() >= self._warm_until:
                return self.agent.let_go()
            self.bot.places.keep_warm(self)
            until = min(until, self._warm_until)
        self.pump(until)

    def _warm_up(self):
        """Start the next process of this thread early, to hide the seconds that start and load take [acp 4.3]."""
        if not self.bot.settings.warm_seconds or self.agent.known.refusal:
            return self.agent.let_go()
        self._warm_until = time.monotonic() + self.bot.settings.warm_seconds
        self.agent.ready()

    # -- what waits ----------------------------------------------------------------------------------------------------

    def batch(self) -> list[Incoming]:
        """Return what goes as one prompt: commands alone, everything else up to the next command.  The lock is held."""
        texts = itertools.takewhile(lambda incoming: not incoming.command, self.waiting)
        return list(texts) or list(self.waiting)[:1]

    def _next_job(self):
        """Return what is next, if that is no prompt.  The lock is held."""
        is_job = self.waiting and not self.turn.messages and self.waiting[0].command in JOBS
        return self.waiting[0] if is_job else None

    def move(self, turn: Turn):
        """Make what goes next the turn's, unless it has its messages.  The lock is held."""
        turn.messages = turn.messages or [self.waiting.popleft() for _ in self.batch()]

    # -- events --------------------------------------------------------------------------------------------------------

    def pump(self, until: float):
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

    def wait(self, until: float):
        """Pump before there is a prompt.  Raises Stopped, also when a job is next, which a warm start must not keep waiting."""
        self.pump(until)
        with self.lock:
            if self.turn:
                self.turn.check_stop()
            if self._next_job():
                raise Stopped

    def aside(self, work: Callable):
        """Do something that takes its time as an errand, while draft and Stop go on; return its result."""
        outcome = Future()

        def run():
            try:
                outcome.set_result(work())
            except Exception as error:   # handed on
                outcome.set_exception(error)
            self.post("wake")

        self.bot.errand(outcome, run)
        while not outcome.done():
            self.wait(math.inf)
        return outcome.result()

    def _on_wake(self):
        """Something waits, was stopped, decided, granted or done; the loops see for themselves.  A message hides the draft."""
        if self.turn:
            self.turn.draft.hide()

    def _on_give_way(self):
        self.agent.take_back()

    def _on_exit(self, kiro):
        kiro.exit_noticed = True
        self.agent.former.discard(kiro)

    def _on_response(self, kiro, frame):
        kiro.responses[frame["id"]] = frame

    def _on_question(self, kiro, method, request_id, params):
        if kiro is self.agent.kiro and self.turn and self.turn.phase is Phase.ASKED:
            self.turn.answer.heard = True
            Question(self, kiro, method, request_id, params).go_on(None)
        else:
            kiro.respond(request_id, QUESTIONS[method][1])

    def _on_notification(self, kiro, method, params):
        """Something between a prompt and its response, or an extension of Kiro's at any time [acp 3.8]."""
        name, server = method.partition("/")[2], params.get("serverName")
        try:
            if kiro is self.agent.kiro and self.turn:
                self.turn.answer.hear(method, params)
            self.agent.hear(kiro, method, params)
            if name in TROUBLE:
                text = TROUBLE[name].format_map(defaultdict(str, params))
                log.warning("%s", text)
                self.notes.add(text, subject=str(server or name))
            elif name == "mcp/oauth_request":
                self._tell_sign_in(kiro, server, str(params.get("oauthUrl")))
        except Exception:   # in a form that nobody expects; it ends nothing
            log.exception("A notification of Kiro's can't be understood: %s %.500s", method, params)

    def _tell_sign_in(self, kiro, server, url):
        """Say where one of Kiro's servers wants a sign-in, each once; silently while nobody waits for Kiro."""
        if url in kiro.sign_ins or len(kiro.sign_ins) == SIGN_INS_AT_MOST:
            return
        kiro.sign_ins.add(url)
        host = host_of(url)
        text = counted(SIGN_IN.format(server, host or ODD_ADDRESS, url))
        buttons = [[(SIGN_IN_AT.format(host), {"url": url})]] if host else []
        self.bot.tell(self.key, text + SIGN_IN_HINT, buttons, silent=not self.turn)

    def _on_give_up(self):
        self.delivery.give_up()

    # -- the end of a turn ---------------------------------------------------------------------------------------------

    def _conclude(self, turn, outcome):
        """Journal the answer, then send it part by part."""
        turn.end()
        self.agent.known.credits = turn.answer.credits
        self.agent.known.spent += turn.answer.credits or 0
        self.agent.let_go()                    # a stop may have left it; Telegram may keep us for hours
        seconds = time.monotonic() - turn.began
        parts = turn.answer.parts(outcome, self.notes.take(), seconds)
        try:
            if not turn.turn_id:
                with self.lock:                # or they were taken, and could not be journaled
                    self.move(turn)
                turn.turn_id = self.store.begin(*self.key, [m.update_id for m in turn.messages])
        except StoreError as error:
            log.error("An answer can't be journaled and is sent all the same: %s", error)
        self.changes = {str(turn.turn_id): turn.answer.changes()}
        self.delivery.send(Outgoing(turn.turn_id, parts, outcome.offer))
        log.info("Turn of %s/%s: %.1f s, %s", *self.key, seconds, outcome.remark or "done")
        if turn.messages and not turn.messages[0].command:
            self._note_title(title_of(words(turn.messages[0].message)))

    def _note_title(self, title):
        """Remember what the session is about, for /sessions; a topic that nobody has named gets a title, once."""
        self.bot.note(self.store.note_used, *self.key, title)
        title = title_of(self.agent.known.title) or title
        if title and (name := self.implicit_name):
            self.implicit_name = ""
            if title != name:
                self.bot.errand(self.chat, self.chat.rename, title)


class Notes:
    """What is to be said with the topic's next answer."""

    def __init__(self):
        self._texts = {}                       # by subject, and what it is where there is none; empty when it was said

    def add(self, text: str, subject: str = ""):
        """Say this; of a subject only the first, since each new process tells it again."""
        self._texts.setdefault((subject, subject or text), text)

    def take(self) -> str:
        """Return what there is to say, and forget all but the subjects."""
        texts = self._texts
        self._texts = {key: "" for key in texts if key[0]}
        return "\n".join(filter(None, texts.values()))


# -- jobs: what takes its place in the queue and is no prompt ------------------------------------------------------------

def _do(conversation, argument):
    """Do the job that is the turn's; return what came of it."""
    agent, turn, buttons = conversation.agent, conversation.turn, []
    command = turn.messages[0].command
    unsent = NOT_PASSED_ON if command == "new" and argument else ""
    turn.doing = ASKING
    try:
        text, buttons = JOBS[command](conversation, argument)
    except Stopped:
        agent.let_go()                         # it may be in another folder, with another session
        text = STOPPED + unsent
    except KiroFailure as failure:
        agent.let_go(at_once=True)
        text = FAILED.format(agent.explain(failure)) + unsent
    turn.end()
    if conversation.bot.places.in_demand():    # Telegram may keep us waiting now
        agent.let_go()
    return "\n".join(filter(None, [conversation.notes.take(), text])), buttons


def _begin_new(conversation, message):
    """Answer /new: begin a session; what was written behind the command goes there."""
    said, job = _begin_session(conversation), conversation.turn.messages[0]
    if message:
        conversation.turn.check_stop()
        rest = copy.copy(job)
        job.update_id = None                   # in the journal both are one message, which is done with the rest
        rest.command = ""                      # whatever it looks like
        rest.message = {**job.message, "text": words(job.message).split(maxsplit=1)[1], "entities": []}
        with conversation.lock:                # before what was written after it
            conversation.waiting.appendleft(rest)
    return said


def _begin_session(conversation, folder="", session=None):
    """Make a session now, not with the next message, or go on with this one; offer the way back."""
    back = session_button(conversation, "sessions", BACK)
    kiro = conversation.agent.begin_anew(folder, session)
    where = conversation.agent.model(), kiro.workspace
    return GOING_ON.format(session.title, *where) if session else NEW_SESSION.format(*where), back


def _choose_folder(conversation, wanted):
    """Answer /folder: show where the topic works, or begin a session in another folder."""
    record, settings, folders = conversation.agent.record(), conversation.bot.settings, _offered_folders(conversation)
    named = [path for path in folders if chosen(wanted, (path, os.path.basename(path)))]
    below = [root / wanted for root in settings.allowed_folders if wanted]     # or absolute
    found = named or list({os.path.realpath(path) for path in below if is_allowed(path, settings)})
    if len(found) == 1 and found[0] != record.workspace_path:
        return _begin_session(conversation, found[0])
    text = WHICH_FOLDER.format(wanted) if len(found) > 1 else WORKS_IN.format(record.workspace_path)
    if wanted and not found:                   # of a new topic, it is just a name
        is_name = "forum_topic_created" in conversation.turn.messages[0].message
        text = "" if is_name else f"⚠️ {FolderRefused(wanted, settings)}"
    elif not settings.allowed_folders:
        text += f" {NO_FOLDERS}"
    return text, choices(conversation, "folder", folders.items(), record.workspace_path)


def _offered_folders(conversation):
    """Return the folders that are offered, with labels: the topic's own, the allowed ones and those directly below."""
    settings = conversation.bot.settings
    paths = {path for root in settings.allowed_folders for path in (root, *root.glob("[!.]*")) if is_allowed(path, settings)}
    shown = {str(path): str(path)[-60:] for path in sorted(paths)[:FOLDERS_SHOWN]}
    return {conversation.agent.default_workspace: OWN_FOLDER, **shown}


def _choose_session(conversation, wanted):
    """Answer /sessions: list those of the topic's folder, or go on with one of them, or one that the topic had elsewhere."""
    record, sessions = conversation.agent.record(), _offered_sessions(conversation)
    session = sessions.get(chosen(wanted, sessions))
    if session and session.session_id != record.session_id:
        owner = conversation.store.owner(session.session_id)
        if owner is None:
            return _begin_session(conversation, session.folder, session)
        return SESSION_TAKEN.format(owner[1] if owner[0] == record.user_id else SOMEBODY_ELSES), []
    text = SESSIONS.format(record.workspace_path) if session or not wanted else NO_SUCH_SESSION
    shown = [(s.session_id, f"{s.title} · {age(s.used_at)}") for s in sessions.values() if s.folder == record.workspace_path]
    return text, (choices(conversation, "sessions", shown[:SESSIONS_SHOWN], record.session_id)
                  + session_button(conversation, "terminal", IN_TERMINAL))


def _offered_sessions(conversation):
    """Return the sessions that Kiro lists for the folder, in either dialect [acp 3.8, 11], and those that the topic had; by
    id, the last used first."""
    agent, kiro, listed = conversation.agent, conversation.agent.started(), []
    params, until = {"cwd": kiro.workspace}, time.monotonic() + LIST_SECONDS
    found = {row[0]: UsedSession(*row) for row in conversation.store.used_sessions(*conversation.key)}
    able = as_dict(kiro.agent.get("agentCapabilities", {}).get("sessionCapabilities"))
    method = "_kiro.dev/session/list" if is_kiro(conversation.bot.settings) else "session/list" if "list" in able else ""
    try:
        while method and time.monotonic() < until:
            page = agent.request(kiro, method, params, LIST_SECONDS)
            listed += as_list(page.get("sessions"))
            params["cursor"] = page.get("nextCursor")
            method = params["cursor"] and method
    except KiroFailure as error:
        log.warning("Kiro's sessions can't be listed: %s", error)
    for told in map(as_dict, listed):
        if "sessionId" in told and told.get("cwd", kiro.workspace) == kiro.workspace:
            name = str(told["sessionId"])
            title = title_of(str(told.get("title") or "")) or name      # better than the first words
            found[name] = UsedSession(name, kiro.workspace, title, str(told.get("updatedAt") or ""))
    return dict(sorted(found.items(), key=lambda item: item[1].used_at, reverse=True))


def _leave_to_terminal(conversation, _):
    """Answer /terminal: the next message takes the session back."""
    agent, settings = conversation.agent, conversation.bot.settings
    agent.let_go()
    agent.await_former()
    record = agent.record()
    line = record.session_id or NONE_YET
    if pid := lock_pid(line):                  # of a Kiro that was killed: the terminal's would respect it
        agent.settle_lock(pid, line, math.inf)
    if is_kiro(settings) and record.session_id:
        command = ["chat" if word == "acp" else word for word in settings.kiro_command]
        line = f"cd {shlex.quote(record.workspace_path)} && {shlex.join([*command, '--resume-id', line])}"
    copy = [[(COPY, {"copy_text": types.CopyTextButton(line)})]] * (len(line) <= COPY_LIMIT)
    return FOR_TERMINAL.format(line), copy


JOBS = {"new": _begin_new, "model": _answer_model, "folder": _choose_folder, "sessions": _choose_session,
        "terminal": _leave_to_terminal}        # by command
OWN = {*ANSWERS, *JOBS}         # commands that are not Kiro's


# ======================================================================================================================
# Turn: from taking messages to what comes of them
# ======================================================================================================================

KEEP_ALIVE_SECONDS = 20         # a draft lives for 30 seconds [tg 1.1]
DEAF_SECONDS = 20               # for a request to be read from the pipe
TURN_GLANCE_SECONDS = 0.5       # between two looks at the clocks of a turn
STOP_SECONDS = 5                # for Kiro to obey a cancel; 2.3 were seen [acp 3.7]
AFTERWORD_SECONDS = 2           # for the response after a `turn_end`, or INTERRUPTED, after which it never comes [acp 4.4]
INTERRUPTED = "Tool uses were interrupted, waiting for the next user prompt"
TOOL_PATIENCE = 6               # times SILENCE_SECONDS while a tool is running
PERMISSION_SECONDS = 30 * 60
PERMISSION_SECONDS_IN_DEMAND = 2 * 60    # while another topic waits for a place
ASK_RETRY_SECONDS = 5
DOWNLOAD_SECONDS = 15 * 60
QUESTION_LIMIT = 20_000         # UTF-16 units; room for the outcome must remain
ARGUMENT_LIMIT = 3000           # characters of one argument of a tool call in a question
ROW_LENGTH = 30                 # characters of the labels of buttons that stand in one row
STYLES = {"allow_once": "success", "reject_once": "danger", "reject_always": "danger"}
NUMBER_AT_MOST = 1e15
SECRET = re.compile(r"passw|passphrase|secret|token|credential|key(?![a-z])", re.I)     # what this chat is no place for
HTTPS = re.compile(r"https://([a-z0-9-]+(?:\.[a-z0-9-]+)+)(?::\d{1,5})?(?:[/?#][!-~]{0,2000})?", re.I)
ANSWER_AT_MOST = 8 * 1024 * 1024         # characters; more is no answer but an accident
TOOLS_KEPT = 100                # calls whose end was not told
PLAN_WIDTH, PLAN_LENGTH = 80, 12         # characters of an entry, entries that /status shows
ACTIVITY_WIDTH = 150            # characters
PLAN_SIGNS = {"completed": "☑", "in_progress": "▸"}
TIME_SHOWN_AFTER = 10           # seconds
CHANGES_AT_MOST = 2 * 1024 * 1024        # characters
OLD, NEW = "\n- ", "\n+ "
LONG_SECONDS = 30               # a turn that takes longer says so


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

    def __init__(self, conversation: Conversation):
        self.conversation, self._agent = conversation, conversation.agent
        self._questions, self._settings = conversation.questions, conversation.bot.settings
        self.phase = Phase.WAITING
        self.draft, self.answer = Draft(conversation.chat), Answer()
        self.doing = THINKING                  # what the draft says while Kiro says nothing
        self.began = time.monotonic()
        self.arrived = conversation.waiting[0].arrived
        self.messages: list[Incoming] = []     # taken, not waiting any more
        self.turn_id: Optional[int] = None     # the journal's, once begun
        self.quiet_since = self.began          # when the clock of silence was set anew
        self._prompt: list[dict] = []          # as ACP content blocks
        self._cancelled_at: Optional[float] = None   # when Kiro was told of the stop

    def stop(self):
        """The user has stopped it, and means what would have gone to Kiro now.  The conversation's lock is held."""
        self.phase = Phase.STOPPING            # WAITING, ASKED -> STOPPING
        self.conversation.move(self)

    def check_stop(self):
        """Raise Stopped if it was stopped."""
        if self.phase is Phase.STOPPING:
            raise Stopped

    def end(self):
        """Kiro is done with it."""
        with self.conversation.lock:
            self.phase = Phase.OVER            # WAITING, ASKED, STOPPING -> OVER
        self._questions.refuse_all(TURN_OVER)

    # -- what is shown -------------------------------------------------------------------------------------------------

    def refresh(self) -> float:
        """Send the next frame if it is due; return when to look again."""
        return self.draft.refresh(self.answer, self._doing_now(), self._time())

    def status(self) -> str:
        """Return what goes on, with the time."""
        return (self._doing_now() or WRITING) + self._time()

    def _time(self):
        seconds = time.monotonic() - self.began
        return f" · {duration(seconds)}" if seconds >= TIME_SHOWN_AFTER else ""

    def _doing_now(self):
        """Return what Kiro does or what it waits for, and how far it is; without the time, which would always be news."""
        return " · ".join(filter(None, [one_line(self._activity(), ACTIVITY_WIDTH), *self.answer.progress()]))

    def _activity(self):
        if self.phase is Phase.OVER:
            return SENDING
        if self.phase is Phase.STOPPING:
            return STOPPING
        if self._questions.open:
            return TO_DECIDE
        if self.answer.running:
            return TOOL.format(self.answer.running)
        return self.answer.trouble or ("" if self.answer.length else self._agent.start_line() or self.doing)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Optional[Outcome]:
        """Bring the waiting messages to Kiro and hear it out; None: they were taken back.  Raises Closing, and StoreError when
        it has not begun."""
        conversation = self.conversation
        try:
            return self._ask_or_again()
        except Stopped:
            if self.turn_id:
                return Outcome(STOPPED, stopped=True)
            return Outcome(STOPPED_BEFORE, offer=True, stopped=True) if self.messages else None
        except KiroFailure as failure:
            if isinstance(failure, FolderRefused):             # where else?
                conversation.bot.errand(conversation.key, conversation.bot.say_as, *conversation.key, "/folder")
            return Outcome(FAILED.format(self._agent.explain(failure)), offer=True)
        except Exception as error:   # a bug: it must not cost what Kiro has said, nor the message
            if conversation.bot.closing.is_set() or isinstance(error, StoreError) and not self.turn_id:
                raise
            log.exception("A turn of %s/%s has failed", *conversation.key)
            return Outcome(FAULT.format(error), offer=True)

    def _ask_or_again(self):
        """Ask Kiro; a process that fails before it said anything is replaced once."""
        for is_last in (False, True):
            try:
                return self._ask()
            except KiroFailure as failure:
                self._agent.let_go(at_once=not isinstance(failure, KiroRefusal))
                with self.conversation.lock:
                    self.check_stop()
                    if is_last or self.answer.heard or not failure.again:
                        raise
                    self.phase = Phase.WAITING                         # ASKED -> WAITING
                log.warning("Once more for %s/%s: %s", *self.conversation.key, failure)

    def _ask(self):
        """Get a process, send the prompt, listen."""
        self.check_stop()
        kiro, conversation = self._agent.ready(), self.conversation
        if not self.turn_id:
            self._take(kiro)
            self.turn_id = conversation.store.begin(*conversation.key, [m.update_id for m in self.messages])
        is_prompt = not self.messages[0].command
        if is_prompt:
            conversation.delivery.unsent.clear()   # Kiro hears of them now
        lesson = self._agent.lesson(wanted=is_prompt)
        with conversation.lock:
            self.check_stop()                  # the last moment at which Kiro need not hear of it
            self.phase = Phase.ASKED           # WAITING -> ASKED
        request_id, self.quiet_since = kiro.prompt(self._prompt + lesson), time.monotonic()
        return self._listen(kiro, request_id)

    def _take(self, kiro):
        """Turn waiting messages into the prompt; wait a moment for the rest of an album or the like."""
        conversation = self.conversation
        while True:
            with conversation.lock:
                self.check_stop()              # else something waits
                batch, newest = conversation.batch(), conversation.waiting[-1]
            until = newest.arrived + newest.patience
            if time.monotonic() < until:
                conversation.wait(until)
                continue
            self._prompt = self._compose(kiro, batch)
            with conversation.lock:
                self.check_stop()
                if batch == conversation.batch():      # else one has come, was edited, or taken back meanwhile
                    return conversation.move(self)

    def _compose(self, kiro, batch):
        """Return the messages as ACP content blocks; their files are downloaded first."""
        if batch[0].command:
            return [{"type": "text", "text": re.sub(r"^(/[\w-]+)@\w+", r"\1", words(batch[0].message))}]
        for incoming in batch:
            if incoming.files is None:
                incoming.files = [self._fetch(kiro, file) for file in files_of(incoming.message)]
        text, self.doing = join_texts(batch), THINKING
        if text.startswith("/"):               # a caption for one: no command, but Kiro would take it for one
            text = f"[Message:]\n{text}"
        if unsent := self.conversation.delivery.unsent:
            text += f"\n\n[From the bot: not sent to the user: {'; '.join(unsent)}]"
        return [{"type": "text", "text": text}, *(image_blocks(batch) if kiro.can("image") else ())]

    def _fetch(self, kiro, file):
        """Return the path of a message's file, fetched into the workspace, and what is to be said of it: the words of a voice
        note, which the user sees too, or why it can't be had."""
        conversation, path, note = self.conversation, "", ""
        try:
            chunks = self._attended(conversation.bot.telegram.download(file.file_id, conversation.key[0]))
            path = conversation.aside(lambda: save(chunks, kiro.workspace, file.name))
            if file.is_speech and self._settings.transcribe_command:
                self.doing = LISTENING
                note = Transcriber(conversation, path, kiro.workspace).text()
                conversation.bot.tell(conversation.key, HEARD.format(note), silent=True)
        except (TelegramError, OSError, ValueError) as error:
            trouble = f"{harmless_name(file.name)}: {getattr(error, 'strerror', None) or error}"
            said = (NOT_HEARD if path else NO_FILE).format(trouble)
            note = f"[From the bot: {said}]"
            conversation.notes.add(said)
        return path, note

    def _attended(self, chunks):
        """Pass a download on for as long as somebody waits for it, within limits.  Runs aside."""
        limit = time.monotonic() + DOWNLOAD_SECONDS
        for chunk in chunks:
            if self.phase is not Phase.WAITING or time.monotonic() > limit:
                raise Unreachable(TAKES_TOO_LONG)
            yield chunk

    def _listen(self, kiro, request_id):
        """Hear Kiro out.  The response ends the turn [acp 3.4]; some only say that it has ended."""
        self.answer.has_ended = False
        while request_id not in kiro.responses:
            now = time.monotonic()
            if self.answer.has_ended and (kiro.exit_noticed or now >= kiro.heard_at + AFTERWORD_SECONDS):
                break
            self._agent.check_alive(kiro)
            self._obey_stop(kiro, now)
            self._watch_silence(kiro, now)
            self._questions.tend(now)
            self.conversation.pump(now + TURN_GLANCE_SECONDS)
        result = kiro.result(request_id) if request_id in kiro.responses else {}
        self.end()                             # which may answer Kiro, before its stdin is closed
        self._agent.let_go()
        reason = result.get("stopReason")
        self._agent.turn_ended(kiro, properly=reason == "end_turn")
        if self._cancelled_at:
            raise Stopped
        return Outcome(STOP_REASONS.get(reason, ""), offer=reason == "cancelled")

    def _obey_stop(self, kiro, now):
        """Pass a stop on to Kiro, and end a Kiro that does not obey."""
        if self.phase is not Phase.STOPPING:
            return
        if self._cancelled_at is None:
            self._cancelled_at = now
            self._questions.refuse_all(BEING_STOPPED)
            kiro.cancel()
        if now >= self._cancelled_at + STOP_SECONDS:
            self._agent.let_go(at_once=True)
            raise Stopped

    def _watch_silence(self, kiro, now):
        """End a Kiro that says nothing for too long."""
        patience = self._settings.silence_seconds * (TOOL_PATIENCE if self.answer.running else 1)
        is_expected = not (self.answer.has_ended or self._questions.open)
        if is_expected and now >= max(kiro.heard_at, self.quiet_since) + patience:
            raise KiroFailure(SILENT.format(patience))


class Final(dict):
    """An answer to Kiro."""
    style: Optional[str] = None                # of its button


class Question:
    """What Kiro asks in a turn, in one message or in several, one after the other.

    Its script yields a text, choices (label, value) and whether the answer may be written; it gets the value of what
    was chosen, or what was written.  What is `Final`, yielded or chosen, is the answer.
    """

    def __init__(self, conversation: Conversation, kiro: Kiro, method: str, request_id, params: dict):
        self.conversation, self._kiro, self._request_id = conversation, kiro, request_id     # the last as it came
        script, self.cancelled = QUESTIONS[method]             # at the end of the turn
        self._script, self.refusal = script(self, params), self.cancelled     # when nobody decides

    def go_on(self, value):
        """Answer Kiro, or have something to ask."""
        questions = self.conversation.questions
        others = [question for question in questions.open if question is not self]
        asked = value if isinstance(value, Final) else self._script.send(value)
        if isinstance(asked, Final):
            questions.open = others
            return self._kiro.respond(self._request_id, asked)
        with self.conversation.lock:
            self.text, self.choices, self.takes_text = asked
            self.token = THIS_RUN + secrets.token_hex(4)
            self.decision = None                   # what to say, and the value
            self.message_id = None                 # once it is in the topic; 0 while it is being sent
            self.asked_at = self.try_at = time.monotonic()     # when Kiro asked; when to try to ask the user (again)
            questions.open = [*others, self]

    def put(self):
        """Put it into the topic; when Telegram can't be reached, note when to try again."""
        self.message_id = 0
        try:
            self.message_id = self.conversation.chat.ask(self.text, self._buttons())
        except Refused as error:
            self.conversation.notes.add(NOT_ASKED.format(self.text, error))     # there is no message to say it
            self.close("", self.refusal)
        except TelegramError:
            self.message_id, self.try_at = None, time.monotonic() + ASK_RETRY_SECONDS

    def _buttons(self):
        """Return the buttons, a few short ones in one row."""
        data = f"ask:{self.conversation.key[1]}:{self.token}"
        row = [(label, {"url": value} if isinstance(value, Link) else
                {"callback_data": f"{data}:{n}", "style": getattr(value, "style", None)})
               for n, (label, value) in enumerate(self.choices)]
        return [row] if len(row) <= 3 and sum(len(label) for label, _ in row) <= ROW_LENGTH else [[button] for button in row]

    def decide(self, outcome: str, value) -> str:
        """Note what a person has decided, and return what to say of it; nothing when that is too late.  The conversation's
        lock is held."""
        if self.decision or self.conversation.turn.phase is Phase.STOPPING:
            return ""
        outcome = CHOSEN.format(whole_characters(outcome))
        self.decision = outcome, value
        self.conversation.post("wake")
        return outcome

    def close(self, why: str, refusal: Final):
        """Go on as was decided, or refuse it; its message says what came of it, and the clock of silence starts anew."""
        conversation = self.conversation
        with conversation.lock:
            self.decision = outcome, value = self.decision or (REFUSED_SINCE.format(why), refusal)
        if self.message_id:
            conversation.bot.errand(conversation.key, conversation.chat.settle, self.message_id, f"{self.text}\n\n{outcome}")
        conversation.turn.quiet_since = time.monotonic()
        self.go_on(value)


def _permission(question, params):
    """Ask about a tool call; ids of options differ between versions, kinds do not [acp 3.6]."""
    conversation, of_kind, choices = question.conversation, {}, []
    for option in map(as_dict, as_list(params.get("options"))):
        if "optionId" in option:
            kind, answer = str(option.get("kind")), Final(outcome={"outcome": "selected", "optionId": option["optionId"]})
            answer.style = STYLES.get(kind)
            of_kind.setdefault(kind, answer)
            choices.append((str(option.get("name") or option["optionId"]), answer))
    question.refusal = of_kind.get("reject_once") or of_kind.get("reject_always") or question.cancelled
    if choices and conversation.bot.settings.ask_permission:
        whole = [counted(label) for label, _ in choices if len(label) > LABEL_LIMIT]       # the buttons show their beginning
        yield "\n".join([conversation.turn.answer.describe(as_dict(params.get("toolCall"))), *whole]), choices, False
    yield of_kind.get("allow_once") or of_kind.get("allow_always") or question.cancelled


def _form(question, params):
    """Ask what Kiro wants to know, field by field, or to open an address (ACP's elicitation); what several fields, or none,
    have got is shown before it goes.  What can't be asked is declined, with a word of why."""
    schema, url, content = as_dict(params.get("requestedSchema")), str(params.get("url")), {}
    fields = {name: without_none(field) for name, field in as_dict(schema.get("properties")).items()}
    head = counted(ASKS.format(params.get("message")))
    if why := _obstacle(params.get("mode", "form"), url, fields):
        question.conversation.notes.add(DECLINED.format(head, counted(why)))
        yield DECLINED_IT[1]
    if params.get("mode") == "url":
        choices = [(OPEN.format(host_of(url)), Link(url)), (DONE, Final(action="accept")), DECLINED_IT]
        yield OPEN_ADDRESS.format(head, host_of(url), url), choices, False
    for name, field in fields.items():
        hint = _wanted(field)
        lines = field.get("title") or name, field.get("description"), hint and WRITE_IT.format(hint)
        text = counted("\n".join(str(line) for line in lines if line))
        optional = [SKIPPED] * (name not in as_list(schema.get("required")))
        choices = [*(() if hint else _options(field).items()), *optional, DECLINED_IT]
        value = yield f"{head}\n{text}", choices, bool(hint)
        while hint and value is not SKIPPED[1] and (value := _value(field, value)) is None:
            value = yield DOES_NOT_FIT.format(text), choices, True
        if value is not SKIPPED[1]:
            content[name] = value
    if len(fields) != 1:
        lines = [head, *(counted(f"{name}: {value}") for name, value in content.items())]
        yield "\n".join(lines), [(SEND, Final(action="accept", content=content)), DECLINED_IT], False
    yield Final(action="accept", content=content)


def _obstacle(mode, url, fields):
    """Return why it can't be asked, or nothing."""
    if mode == "url":
        return "" if host_of(url) else NOT_HTTPS.format(url)
    if any(SECRET.search(f"{name} {field.get('title')} {field.get('format')}") for name, field in fields.items()):
        return NO_SECRETS
    fits = mode == "form" and all(_wanted(field) or _options(field) for field in fields.values())
    return "" if fits else NOT_SHOWN


def _options(field):
    """Return what there is to choose for a form's field, or for each item of a list: values by label."""
    if field.get("type") == "boolean":
        return {YES: True, NO: False}
    field = as_dict(field.get("items")) or field
    options = as_list(field.get("oneOf") or field.get("anyOf") or field.get("enum"))
    options = [option if isinstance(option, dict) else {"const": option} for option in options]
    return {str(option.get("title") or option.get("const")): option.get("const") for option in options}


def _wanted(field):
    """Say what the person may write into a form's field; nothing where they can't.

    A pattern is told and not checked: somebody else's can take for ever, and hold the interpreter's lock meanwhile.
    """
    kind, labels = str(field.get("type")), ", ".join(_options(field))
    if kind not in WRITTEN or bool(labels) != (kind == "array"):
        return ""
    limits = (limit.format(field[name]) for name, limit in LIMITS.items() if name in field)
    return ", ".join([WRITTEN[kind].format(labels), *limits])


def _value(field, text):
    """Return what was written as the field's value; None when it does not fit."""
    try:
        if field["type"] == "array":
            values = {label.lower(): value for label, value in _options(field).items()}
            return [values[word.strip().lower()] for word in text.split(",")]
        value = {"integer": int, "number": float}.get(field["type"], str)(text)
        size, kind = (len(text), "Length") if value is text else (value, "imum")
        return value if field.get("min" + kind, -NUMBER_AT_MOST) <= size <= field.get("max" + kind, NUMBER_AT_MOST) else None
    except (LookupError, ValueError, TypeError):     # none of them, not of this type, or limits that are none
        return None


def host_of(url: str) -> str:
    """Return the host of a plain https address, without a user in it; of any other nothing."""
    match = HTTPS.fullmatch(url)
    return match[1] if match else ""


QUESTIONS = {"session/request_permission": (_permission, Final(outcome={"outcome": "cancelled"})),
             "elicitation/create": (_form, Final(action="cancel"))}       # what Kiro may ask in a turn, and the answer of none
DECLINED_IT, SKIPPED = (DECLINE, Final(action="decline")), (SKIP, object())


class Questions:
    """What is asked in a conversation's turn.  `decide` and `hear` may be called from any thread, and only note what was
    decided; everything else runs on the conversation's own."""

    def __init__(self, conversation: Conversation):
        self._conversation = conversation
        self.open: list[Question] = []         # replaced as a whole

    def decide(self, token: str, index: int) -> str:
        """Take a button for the answer; return what to say of it, or nothing when that is over."""
        with self._conversation.lock:
            for question in self.open:
                if question.token == token and index < len(question.choices):
                    return question.decide(*question.choices[index])
        return ""

    def hear(self, text: str) -> str:
        """Take what a person has written for the answer; return nothing when none is waited for."""
        with self._conversation.lock:
            for question in self.open if text else ():
                if question.takes_text and question.message_id is not None:
                    return question.decide(text, text)
        return ""

    def tend(self, now: float):
        """Go on from what was decided, ask what has not been asked, refuse what was not answered in time."""
        turn, in_demand = self._conversation.turn, self._conversation.bot.places.in_demand()
        patience = PERMISSION_SECONDS_IN_DEMAND if in_demand else PERMISSION_SECONDS
        for question in self.open:
            if turn.phase is Phase.STOPPING:       # it must not wait until all are asked
                return
            if question.decision or now >= question.asked_at + patience:
                question.close(NOBODY_ANSWERED.format(patience / 60), question.refusal)
            elif question.message_id is None and now >= question.try_at:
                question.put()
                turn.draft.hide()

    def refuse_all(self, why: str):
        """Refuse what is asked in a turn that is over, or being stopped, and was not decided."""
        while self.open:
            self.open[0].close(why, self.open[0].cancelled)


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
TRANSCRIPT_AT_MOST = 100_000    # bytes
IMAGE_BYTES = 3_700_000         # of one image block [acp 7]
IMAGES_BYTES = 9_000_000        # of all image blocks of a prompt
IMAGES_AT_MOST = 10             # of a prompt [acp 7]
IMAGE_TYPES = re.compile(rb"(?P<png>\x89PNG\r\n)|(?P<jpeg>\xff\xd8\xff)|(?P<webp>RIFF....WEBP)", re.S)
IMAGE_SIZES = re.compile(rb"\A\x89PNG.{12}(.{4})(.{4})|\xff[\xc0-\xc3\xc5-\xcf]\0[\x0b\x11\x14]\x08(..)(..)", re.S)
IMAGE_EDGE = 2000               # pixels; larger images can poison a session [acp 4.6]
NAME_LENGTH = 96                # bytes of a saved file's name: the last, as they tell its kind
FILE_KINDS = {"photo": ".jpg", "animation": ".mp4", "document": "", "audio": "", "voice": ".oga", "video": "",
              "video_note": ".mp4"}      # with an extension where Telegram tells no type; an animation has a document too
LINE_KINDS = ["venue", "location", "contact", "poll", "dice", "checklist"]      # a venue has a location too
TEXTS = {"summary": "", "text": "entities", "alternative_text": "", "button": "", "caption": "caption_entities", "credit": ""}
UNREAD = {"text": "(This could not be read.)"}     # in the place of a quote


def contents(message: dict) -> tuple[str, list[TelegramFile]]:
    """Return what a message itself brings: its words and its file."""
    return words(message), file_in(message)


def words(message: dict) -> str:
    """Return what the person wrote [tg 2.1], as Markdown; a place, a poll and the like as one line."""
    lines = [_markdown({**message, **message.get("rich_message", {})}), message.get("sticker", {}).get("emoji", ""),
             *[f"[{kind}: {json.dumps(message[kind], ensure_ascii=False)}]" for kind in LINE_KINDS if kind in message][:1]]
    return "\n".join(filter(None, lines)).strip("\n")


def _marked(text, entities):
    """Return a text with its entities as Markdown."""
    cells = [cell for c in text for cell in [c, ""][:1 + (c > "\uffff")]]      # one for each UTF-16 unit: so offsets count
    for span in sorted(entities, key=lambda span: (-span["offset"], span["length"])):      # the inner ones first
        place = slice(span["offset"], span["offset"] + span["length"])
        cells[place] = [_markdown({**span, "text": "".join(cells[place])}), *[""] * (span["length"] - 1)]
    return "".join(cells)


def _markdown(value):
    """Return a message, a rich text or a block of it as Markdown, as far as it matters to Kiro: a line for each block, list
    item and row."""
    if isinstance(value, list):
        return "".join(map(_markdown, value))
    if not isinstance(value, dict):
        return str(value)
    texts = [_marked(_markdown(value[name]), value.get(entities, [])) for name, entities in TEXTS.items() if name in value]
    items = [f"{item.get('label', '-')} {_markdown(item)}" for item in value.get("items", [])]
    rows = [f"| {' | '.join(map(_markdown, row))} |" for row in value.get("cells", [])]
    if rows:
        rows.insert(1, "|---" * len(value["cells"][0]) + "|")
    text = "\n".join([*texts, *map(_markdown, value.get("blocks", [])), *items, *rows])
    kind, url = value.get("type", ""), value.get("url")
    if "expression" in value:
        return f"${value['expression']}$"
    if kind in ("code", "pre"):
        ticks = "```" if kind == "pre" else "`"
        while ticks in text:
            ticks += "`"
        return f"\n{ticks}{value.get('language', '')}\n{text}\n{ticks}\n" if kind == "pre" else f"{ticks}{text}{ticks}"
    if kind.endswith("quote"):
        return f"\n{textwrap.indent(text, '> ', bool)}\n"
    return f"[{text}]({url})" if url and url != text else text


def _reply_in(message):
    """Return what the message replies to; not a topic's first message: clients put it there by themselves [tg 3.2]."""
    reply, thread_id = message.get("reply_to_message", {}), message.get("message_thread_id")
    return message.get("external_reply", {}) if reply.get("message_id", thread_id) == thread_id else reply


def full_text(message: dict) -> str:
    """Return a message's words, below what it replies to and where it comes from."""
    reply, quote, forward = _reply_in(message), message.get("quote"), message.get("forward_origin")
    lines = [f"[From {_author(reply['origin'])}]" if "origin" in reply else "",
             _markdown(quote) if quote else words(reply),
             *(f"[File {file.name}, {file.size} bytes]" for file in file_in(reply))]
    above = textwrap.indent("\n".join(filter(None, lines)), "> ", bool)
    said = (f"[Forwarded from {_author(forward)}]\n" if forward else "") + words(message)
    return f"{above}\n\n{said}" if above else said


def _author(origin):
    """Return the name of whom a forward or a quote is from."""
    facts = {**origin, **next((value for value in origin.values() if isinstance(value, dict)), {})}
    return " ".join(filter(None, map(facts.get, ("title", "first_name", "last_name", "sender_user_name")))) or "somebody"


def join_texts(batch: list[Incoming]) -> str:
    """Join messages and the names of their files to one text; a pasted text that the client split is put together again."""
    text = last = ""
    for incoming in batch:
        message, lines = incoming.message, [full_text(incoming.message)]
        for path, note in incoming.files or ():
            lines += note, path and f"[File: {path}]"
        block = "\n".join(filter(None, lines))
        text += ("\n" if len(last) >= SPLIT_TEXT_LENGTH else "\n\n") * bool(text and block) + block
        last = message.get("text", "")
    return text


def image_blocks(batch: list[Incoming]) -> list[dict]:
    """Return the images as ACP blocks, as far as they fit into one prompt."""
    blocks, room = [], IMAGES_BYTES
    for path in (path for incoming in batch for path, _ in incoming.files if path):
        with open(path, "rb") as file:
            data = file.read(IMAGE_BYTES + 1)
        edges = (int.from_bytes(edge, "big") for size in IMAGE_SIZES.findall(data) for edge in size)
        is_shown = image_type(data) in ("image/png", "image/jpeg") and all(edge <= IMAGE_EDGE for edge in edges)
        if is_shown and len(data) <= min(IMAGE_BYTES, room):
            room -= len(data)
            blocks.append({"type": "image", "mimeType": image_type(data), "data": base64.b64encode(data).decode()})
    return blocks[:IMAGES_AT_MOST]


def image_type(data: bytes) -> str:
    """Return the MIME type of an image by its first bytes, or nothing."""
    match = IMAGE_TYPES.match(data)
    return f"image/{match.lastgroup}" if match else ""


class TelegramFile(NamedTuple):
    """A file of a message: what Telegram tells of it."""
    file_id: str
    size: int                   # bytes; 0 when Telegram does not say
    name: str                   # the sender's, or one of ours
    is_speech: bool             # a voice note of this message


def files_of(message: dict) -> list[TelegramFile]:
    """Return the message's file, and the one that it replies to."""
    return file_in(message) + [file._replace(is_speech=False) for file in file_in(_reply_in(message))]


def file_in(message: dict) -> list[TelegramFile]:
    """Return the file of a message, if there is one; of a photo the largest size that is not too large [acp 7]."""
    kind = next((kind for kind in FILE_KINDS if message.get(kind)), "")
    if not kind:
        return []
    media = message[kind]
    if kind == "photo":
        media = ([p for p in media if max(p["width"], p["height"]) <= IMAGE_EDGE] or media[:1])[-1]
    extension = mimetypes.guess_extension(media.get("mime_type", "")) or FILE_KINDS[kind]
    name = media.get("file_name") or f"{kind}_{message.get('message_id', '')}{extension}"
    return [TelegramFile(media["file_id"], media.get("file_size", 0), name, kind in ("voice", "video_note"))]


def harmless_name(name: str) -> str:
    """Return a file name without path, control and direction-changing characters, never hidden, of bounded length."""
    name = "".join("_" if c in '/\\:*?"<>|;' or not c.isprintable() else c for c in name)
    return name.encode()[-NAME_LENGTH:].decode(errors="ignore").strip(" .-") or "file"


def save(chunks: Iterator[bytes], workspace: str, name: str) -> str:
    """Stream a file into the uploads under a temporary name, then give it one that is free, or that of the same file; return
    the path.  Raises OSError."""
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
            file.writelines(chunks)
        stem, n = path.stem, 1
        while os.path.lexists(path) and not filecmp.cmp(temporary, path, shallow=False):
            n += 1
            path = path.with_stem(f"{stem}-{n}")
        return str(temporary.rename(path))
    finally:
        temporary.unlink(missing_ok=True)


# ======================================================================================================================
# Agent: a topic's hold on Kiro
# ======================================================================================================================

SESSION_SECONDS = 90            # how long Kiro may take [acp 10], each but for silence: SILENCE_SECONDS if that is less
MODEL_SECONDS = 5
LOCK_SECONDS = 15               # for a lock to be freed
LOCK_PAUSE = 0.5                # seconds between two looks at it
REQUEST_PATIENCE = 4            # times its seconds, for a request during which Kiro keeps talking
SLOW_START_SECONDS = 3          # after which the draft tells what Kiro said on stderr
REPLAY_SECONDS = 1.0            # for what some agents replay after their response to session/load
QUIET_SECONDS = 0.03            # a replay is over when nothing came for this long
FULL_CONTEXT = 80               # percent
COMMANDS_SHOWN, COMMAND_WIDTH = 20, 100
LIST_SECONDS = 5
SESSIONS_SHOWN = 10
FOLDERS_SHOWN = 24
MODELS_SHOWN = 60               # buttons: Telegram takes 100, of 10 kB in all
PATH_SHOWN = 200                # characters of one that was refused
COPY_LIMIT = 256                # characters that a button can copy


class KiroFailure(Exception):
    """Kiro could not do it; the text is for the user.  `again`: worth one more try with a fresh process."""

    def __init__(self, text, again=False, said=""):
        super().__init__(text)
        self.again = again
        self.said = said or text   # all by which its kind is known


class KiroRefusal(KiroFailure):
    """A JSON-RPC error.  It says why in `data`, a string or an object; other agents in `message` [acp 3.4, 11]."""

    def __init__(self, error):
        message, data = map(as_dict(error).get, ("message", "data"))
        texts = [message, data, *map(as_dict(data).get, ("details", "message", "error"))]
        told = [text for text in texts if isinstance(text, str) and text.strip(" \n.").lower() not in ("", "internal error")]
        text = ": ".join(dict.fromkeys(told[:2])) or str(data or error)
        super().__init__(REFUSED.format(counted(text)), said=str(error)[:QUESTION_LIMIT])
        self.again = is_login(self)              # a warm process may have outlived its login


class FolderRefused(KiroFailure):
    """The topic can't work in that folder."""

    def __init__(self, path, settings):
        allowed = ", ".join(map(str, settings.allowed_folders))
        super().__init__(FOLDER_REFUSED.format(one_line(path, PATH_SHOWN), allowed or NO_FOLDERS))


class NoPlace(Exception):
    """No process may be started or kept for this conversation now."""


class Places:
    """The right to have a Kiro process, MAX_PROCESSES times.  A free one goes to the waiting conversation whose user holds
    fewest; among equals first come, first served.

    Warm processes give way: whenever somebody queues, the one unused longest is asked to.
    """

    def __init__(self, count):
        self.count = count
        self._held = Counter()                          # places, by user
        self._queue = {}                                # by conversation: when what it waits for arrived
        self._warm = {}                                 # by conversation, the last used last: was it asked to give way
        self._lock = threading.Lock()

    def take(self, conversation: Conversation) -> bool:
        """Take a place; False when there is none, or somebody who waits goes first.  Whoever has a turn waits then, until it
        leaves, and is woken whenever a place may be had."""
        turn = conversation.turn
        with self._lock:
            is_full = self._held.total() >= self.count
            if turn and conversation not in self._queue:
                self._queue[conversation] = turn.arrived
                if is_full:
                    self._ask_a_warm_one()
            if is_full or self._in_order()[:1] not in ([], [conversation]):
                return False
            self._held[conversation.key[0]] += 1
            return True

    def ahead(self, conversation: Conversation) -> Optional[int]:
        """Return how many of those that wait go before this one; None when it does not wait."""
        with self._lock:
            return self._in_order().index(conversation) if conversation in self._queue else None

    def leave(self, conversation: Conversation):
        """Wait no longer; the others are a step further."""
        with self._lock:
            if self._queue.pop(conversation, None):
                self._wake()

    def give_back(self, conversation: Conversation):
        """A process has gone."""
        with self._lock:
            self._held[conversation.key[0]] -= 1
            for first in self._in_order()[:1]:     # with hundreds in the queue it is dear to wake all
                first.post("wake")

    def keep_warm(self, conversation: Conversation):
        """Its process is not in use; it may be asked to give way."""
        with self._lock:
            if conversation not in self._warm:
                self._warm[conversation] = False
                if self._queue:
                    self._ask_a_warm_one()

    def claim(self, conversation: Conversation) -> bool:
        """Use its process again; False when it has been asked to give way."""
        with self._lock:
            return not self._warm.pop(conversation, False)

    def in_demand(self) -> bool:
        """Does somebody wait for a place?"""
        return bool(self._queue)

    def _in_order(self):
        return sorted(self._queue, key=lambda waiting: (self._held[waiting.key[0]], self._queue[waiting]))

    def _wake(self):
        for conversation in self._queue:
            conversation.post("wake")

    def _ask_a_warm_one(self):
        for conversation, was_asked in self._warm.items():
            if not was_asked:
                self._warm[conversation] = True
                return conversation.post("give_way")


class Known:
    """What Kiro and its answers have told of the present session."""
    context = 0.0              # percent used
    credits = None             # of the last turn
    spent = 0.0                # in all turns since the bot knows the session
    title = ""                 # that Kiro gives the session
    refusal = None             # the words of the last turn's, without numbers


class Agent:
    """A topic's hold on Kiro: the process for this or the next turn, with the topic's session and model, and those that are
    still ending.  On its conversation's thread only.

    While it waits, events are handled, and one of them may take a warm process away: `check_alive` finds that out.
    """

    def __init__(self, conversation):
        self._conversation, self._key = conversation, conversation.key
        self._settings, self._store, self._places = conversation.bot.settings, conversation.store, conversation.bot.places
        self.default_workspace = "{}/{}/{}".format(self._settings.workspaces, *self._key)      # what a new thread gets
        self.kiro = None
        self.former = set()                     # those that are still ending: they may hold the session's lock
        self.models = Models()                  # what Kiro told last; replaced as a whole, so any thread may read it
        self.commands = []                      # a line for each of Kiro's own; replaced as a whole
        self.known = Known()
        self._ways = []                         # to log in, as the agent told them
        self._refused = {}                      # by session and words: since when it is refused so

    # -- the process ---------------------------------------------------------------------------------------------------

    def ready(self) -> Kiro:
        """Return a process with the thread's session loaded and its model set; each step is done once.  Raises KiroFailure,
        Stopped, Closing, and NoPlace when there is no turn that could wait for a place: then the process has to be let go."""
        kiro = self.started()
        if not kiro.session_id:
            kiro = self._open_session(kiro)
        self._apply_model(kiro)
        return kiro

    def begin_anew(self, folder: str = "", session: Optional[UsedSession] = None) -> Kiro:
        """Return another process with another session, which is the thread's from now on: a new one, in another folder if one
        is given, or this one.  Raises as `ready`."""
        self.let_go()
        kiro = self.started(folder)
        if session is None:
            self._new_session(kiro)
        else:
            self.await_former()
            self._store.set_facts(session.session_id)      # or a new row would say that no turn of it has ended
            if not self._load_session(kiro, session.session_id):
                raise KiroFailure(SESSION_REFUSED)
        return kiro

    def started(self, folder: str = "") -> Kiro:
        """Return a process that has answered `initialize`; a dead one is replaced, unnoticed."""
        if self.kiro is None or self.kiro.exit_noticed:
            self.let_go()
            self._start(folder)
        kiro = self.kiro
        if kiro.agent is None:
            kiro.agent = self.request(kiro, "initialize", INITIALIZE, self._settings.start_seconds)
            self._ways = kiro.agent.get("authMethods", [])
        return kiro

    def start_line(self) -> str:
        """Return what the start of a process waits for: a place, or what it says on stderr when it takes long."""
        kiro, ahead = self.kiro, self._places.ahead(self._conversation)
        if ahead is not None:
            return WAITING.format(ahead)
        if kiro is None or kiro.agent is not None or time.monotonic() < kiro.heard_at + SLOW_START_SECONDS:
            return ""
        return kiro.stderr.strip().rpartition("\n")[2]

    def _start(self, folder):
        """Start a process as soon as there is a place for it; wait for a program that is just being replaced."""
        conversation, workspace, limit = self._conversation, self.workspace(folder), time.monotonic() + REPLACED_SECONDS
        while self.kiro is None:
            self._take_place()
            try:
                self.kiro = Kiro(conversation, workspace)
            except OSError as error:
                if time.monotonic() > limit:
                    raise KiroFailure(NO_START.format(self._settings.kiro_command[0], error.strerror)) from error
                conversation.wait(time.monotonic() + 0.2)
            finally:
                if self.kiro is None:
                    self._places.give_back(conversation)
        if conversation.turn is None:
            self._places.keep_warm(conversation)

    def _take_place(self):
        """Get the right to start a process.  Without a turn, only a place that nobody wants will do."""
        conversation = self._conversation
        try:
            while not self._places.take(conversation):
                if not (conversation.turn or self.former):     # one of these may free its place
                    raise NoPlace
                conversation.wait(math.inf)
        finally:
            self._places.leave(conversation)

    def take_back(self):
        """Use the warm process again, unless it has been asked to give way."""
        if not self._places.claim(self._conversation):
            self.let_go()

    def let_go(self, at_once: bool = False):
        """Let go of the process: it ends by itself, or is ended by its keeper."""
        kiro, self.kiro = self.kiro, None
        if kiro is None:
            return
        self._places.claim(self._conversation)
        if not kiro.exit_noticed:
            self.former.add(kiro)
        kiro.end(patience=0 if at_once or kiro.agent is None else END_SECONDS)     # one that still starts holds no lock

    def await_former(self):
        """Wait until no former process holds the session's lock; their keepers see to it."""
        limit = time.monotonic() + END_SECONDS + 2 * TERM_SECONDS + LOCK_SECONDS
        while self.former:
            if time.monotonic() > limit:
                raise KiroFailure(NO_END)
            self._conversation.wait(limit)

    def request(self, kiro: Kiro, method: str, params: dict, seconds: float) -> dict:
        """The one way to ask Kiro something: return the result.  Raises KiroFailure, Stopped, NoPlace."""
        if kiro.agent:                         # else it may wait in a cluster's queue
            seconds = min(seconds, self._settings.silence_seconds)
        request_id, asked_at = kiro.request(method, params), time.monotonic()
        while request_id not in kiro.responses:
            self.check_alive(kiro)
            limit = min(max(kiro.heard_at, asked_at) + seconds, asked_at + REQUEST_PATIENCE * seconds)
            if time.monotonic() >= limit:
                raise KiroFailure(NO_ANSWER.format(method, seconds), again=True)
            self._conversation.wait(min(limit, time.monotonic() + 1))
        return kiro.result(request_id)

    def check_alive(self, kiro: Kiro):
        """Raise if the process can't answer any more: given away, gone, or deaf."""
        if kiro is not self.kiro:
            raise NoPlace
        if kiro.exit_noticed:
            raise kiro.failure()
        if kiro.agent and kiro.heard_at < kiro.wrote_at < time.monotonic() - DEAF_SECONDS and kiro.is_deaf():
            raise KiroFailure(DEAF, again=True)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def record(self) -> SessionRecord:
        """Return the thread's row, or what it would be."""
        return self._store.get_session(*self._key) or SessionRecord(*self._key, "", self.default_workspace)

    def workspace(self, chosen: str = "") -> str:
        """Return the folder in which the thread works, or is to work.  Its default one is made when it is missing, and if it is
        there takes the place of a former default one, as when the bot's folder has moved.  Raises KiroFailure."""
        record, default = self.record(), self.default_workspace
        path = chosen or record.workspace_path
        if not path.endswith("/{}/{}".format(*self._key)):
            if not is_allowed(path, self._settings):
                raise FolderRefused(path, self._settings)
        elif os.path.isdir(default) and not os.path.isdir(path):
            path = default
        try:
            if path == default:
                os.makedirs(path, mode=0o700, exist_ok=True)
            return os.path.realpath(path, strict=True)
        except OSError as error:
            raise KiroFailure(FOLDER_GONE.format(path, error.strerror)) from error

    def _open_session(self, kiro):
        """Load the thread's session, or make one; return the process that has it, another one when the session is lost."""
        record, note = self._store.get_session(*self._key), NO_HISTORY
        facts = record and self._store.get_facts(record.session_id)
        if record and kiro.can("loadSession"):
            self.await_former()               # it has the lock, and may still be writing; so may an orphan
            if facts.ended or not is_empty(record.session_id) or lock_pid(record.session_id) is not None:
                if self._load_session(kiro, record.session_id):
                    return kiro
                self.let_go(at_once=True)
                kiro, note = self.started(), NOTHING_KEPT if is_empty(record.session_id) else HISTORY_GONE
        self._new_session(kiro)
        if record and facts.ended:
            note = note.format(record.session_id)
            self._conversation.notes.add(note, subject=note)       # each process would say again that it has no history
        return kiro

    def _new_session(self, kiro):
        """Make a session for this thread; the chosen model stays."""
        result = self.request(kiro, "session/new", {"cwd": kiro.workspace, "mcpServers": []}, SESSION_SECONDS)
        if "sessionId" not in result:
            raise KiroRefusal("the answer to session/new has no sessionId")
        self._opened(kiro, result["sessionId"], result)

    def _load_session(self, kiro, session_id):
        """Load the session, dealing with its lock; what Kiro replays is dropped at the door [acp 3.3].  False: it is lost."""
        params, facts = {"sessionId": session_id, "cwd": kiro.workspace, "mcpServers": []}, self._store.get_facts(session_id)
        limit, missing, result = time.monotonic() + LOCK_SECONDS, has_vanished(session_id, facts), None
        while result is None:
            try:
                result = self.request(kiro, "session/load", params, SESSION_SECONDS)
            except KiroFailure as failure:
                since = self._refused.setdefault((session_id, _same_words(failure.said)), time.monotonic())
                locked = LOCKED.search(failure.said)
                if locked and not kiro.exit_noticed:
                    self.settle_lock(int(locked[1]), session_id, limit)
                elif _is_lost(session_id, facts, failure, since):
                    log.warning("Session %s of %s/%s is lost: %s", session_id, *self._key, failure)
                    return False
                else:
                    raise
        self._let_replay_end(kiro)
        if missing and facts.ended and not kiro.replayed_before_response:      # some agents accept any id [acp 11]
            self._store.set_facts(session_id, ended=False, taught=False)
            self._conversation.notes.add(HISTORY_GONE.format(session_id))
        self._opened(kiro, session_id, result)
        return True

    def settle_lock(self, pid: int, session_id: str, limit: float):
        """Do what can be done about the process that holds a session's lock; return when loading may be tried again.

        A dying process of ours: nothing, its keeper ends it.  An orphan of ours: end it.  A dead process: remove its lock.
        Raises KiroFailure for a living stranger, and when it is too late.
        """
        end_orphans(self._settings.folder)
        if not is_ours(pid):
            if runs_as_kiro(pid, self._settings):
                raise KiroFailure(OPEN_ELSEWHERE.format(pid))
            if self._store.get_note(LOCKS_BY_PID):
                remove_lock(session_id, pid)
        if time.monotonic() > limit:
            raise KiroFailure(STILL_LOCKED.format(pid, session_file(session_id, "lock")))
        self._conversation.wait(time.monotonic() + LOCK_PAUSE)

    def _let_replay_end(self, kiro):
        """Some agents replay after their response [acp 11]: wait for a moment of quiet, unless it came before."""
        limit = time.monotonic() + REPLAY_SECONDS
        while not kiro.replayed_before_response and (until := min(kiro.heard_at + QUIET_SECONDS, limit)) > time.monotonic():
            self._conversation.wait(until)

    def _opened(self, kiro, session_id, result):
        """Note what a session/new or session/load has told; from now on the session is the thread's.  And whether the lock that
        Kiro has just taken names its process: only then do the pids in locks mean something here."""
        record = self.record()
        if (record.session_id, record.workspace_path) != (session_id, kiro.workspace):
            self._store.upsert_session(*self._key, session_id, kiro.workspace, keep_model=True)
            self.known = Known()
        self._refused.clear()
        kiro.session_id, pid, models = session_id, lock_pid(session_id), _models_of(result)
        if models.offered:
            self.models, kiro.model = models, models.current
        self._store.set_note(LOCKS_BY_PID, "yes" if pid and kiro.owns(pid) else "")

    def _apply_model(self, kiro):
        """Make Kiro use the model that somebody chose for this thread; where nobody did, it is told nothing."""
        wanted, models, notes = self._store.chosen_model(*self._key), self.models, self._conversation.notes
        if not models.offered or wanted in (None, kiro.model):
            return
        if wanted not in models.offered:
            self._store.set_model(*self._key, "auto", is_chosen=False)
            return notes.add(MODEL_GONE.format(wanted))
        method, params = "session/set_model", {"modelId": wanted}
        if models.config_id is not None:
            method, params = "session/set_config_option", {"configId": models.config_id, "value": wanted}
        kiro.model = wanted
        try:
            self.request(kiro, method, {"sessionId": kiro.session_id, **params}, MODEL_SECONDS)
        except KiroFailure as failure:
            if kiro.exit_noticed:
                raise
            notes.add(MODEL_REFUSED.format(wanted, failure))

    def model(self) -> str:
        """Return the thread's model: the one that was chosen, else what Kiro reported last."""
        wanted, models = self._store.chosen_model(*self._key), self.models
        is_there = wanted in models.offered or not models.offered
        return is_there and wanted or models.current or "auto"

    # -- what is known of the session ----------------------------------------------------------------------------------

    def hear(self, kiro: Kiro, method: str, params: dict):
        """Take in what a notification says about the session [acp 3.8, 11]."""
        name, update = method.partition("/")[2], params.get("update", {})
        used, size = finite(update.get("used")), finite(update.get("size"))
        percent = finite(params.get("contextUsagePercentage"))
        if used and size:
            percent = 100 * used / size
        if percent is not None:
            if self.known.context < FULL_CONTEXT <= percent:
                self._conversation.notes.add(NEARLY_FULL.format(percent))
            self.known.context = percent
        if commands := params.get("commands") or update.get("availableCommands"):
            self.commands = [
                f"/{str(command.get('name')).lstrip('/')} – {one_line(str(command.get('description') or ''), COMMAND_WIDTH)}"
                for command in map(as_dict, as_list(commands)[:COMMANDS_SHOWN]) if "name" in command]
        if update.get("sessionUpdate") == "session_info_update":
            self.known.title = update.get("title") or self.known.title
        if name in ("clear/status", "compaction/status"):
            self.known.context, kiro.is_told = 0.0, False
            self._note_facts(kiro, taught=False)

    def lesson(self, wanted: bool) -> list[dict]:
        """Return what tells Kiro of the tags, as content blocks for its next prompt; none where it knows them."""
        self.kiro.is_told = wanted and not self._store.get_facts(self.kiro.session_id).taught
        return [{"type": "text", "text": LESSON}] if self.kiro.is_told else []

    def turn_ended(self, kiro: Kiro, properly: bool):
        """A turn of the session has ended, by itself or not: it has a history, and may know the tags now."""
        self.known.refusal = None
        self._note_facts(kiro, **({"taught": True} if kiro.is_told and properly else {}))

    def _note_facts(self, kiro, **facts):
        """Note what is known of the session now; no reason to lose an answer."""
        session_id = kiro.session_id
        if session_id:
            self._conversation.bot.attempt(
                lambda: self._store.set_facts(session_id, ended=True, in_sight=is_in_sight(session_id), **facts))

    def explain(self, failure: KiroFailure) -> str:
        """Return what to say of it: what has happened, what to do about it, and then the technical words."""
        what, _, technical = str(failure).partition("\n")
        return "\n".join(filter(None, [what, self._advice(failure), technical]))

    def _advice(self, failure):
        if is_login(failure):
            ways = [str(way["description"]) for way in map(as_dict, self._ways) if "description" in way]
            return LOG_IN.format(KIRO_LOGIN if is_kiro(self._settings) or not ways else "; ".join(ways))
        if not isinstance(failure, KiroRefusal):
            return TRY_AGAIN if failure.again else ""
        if PASSING.search(failure.said):
            return WAIT_A_LITTLE
        before, self.known.refusal = self.known.refusal, _same_words(str(failure))
        return REFUSES_ALL if before == self.known.refusal else TRY_AGAIN


def _is_lost(session_id, facts, failure, since):
    """Decide whether Kiro does not have the session any more; a passing trouble must not throw one away.  There is no clean
    error for it [acp 3.3]: the answer says so, or the session's files do, or another process refused it in the same words
    some seconds ago (`since` when they are heard)."""
    if is_login(failure) or PASSING.search(failure.said):
        return False
    if is_empty(session_id) or has_vanished(session_id, facts):
        return True
    if not isinstance(failure, KiroRefusal) or facts.ended and is_in_sight(session_id):
        return False
    return LOST.search(failure.said) or not facts.ended or time.monotonic() - since > REFUSED_AGAIN_SECONDS


def _same_words(text):
    """Return the text without ids and numbers, which differ from one time to the next."""
    return re.sub(r"[0-9a-f-]{8,}|\d+", "", text)


def _models_of(result):
    """Return the models of a session/new or session/load result, in either dialect [acp 8, 11]."""
    models = result.get("models", {})
    plain = {"category": "model", "options": models.get("availableModels"), "currentValue": models.get("currentModelId")}
    for option in map(as_dict, [plain, *result.get("configOptions", ())]):
        offered = {}
        for group in map(as_dict, as_list(option.get("options"))):
            for choice in map(as_dict, as_list(group.get("options", [group]))):      # or no group, but a choice itself
                if model := choice.get("modelId", choice.get("value")):
                    offered[str(model)] = str(choice.get("name") or model)
        if offered and option.get("category") == "model":
            return Models(offered, str(option.get("currentValue") or ""), option.get("id"))
    return Models()


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
        kept = settings.folder, settings.workspaces, kiro_home().resolve()
        is_apart = not any(real.is_relative_to(own) or own.is_relative_to(real) for own in kept)
        is_below = any(map(real.is_relative_to, settings.allowed_folders))
        return is_below and is_apart and real.is_dir() and os.access(real, os.R_OK | os.X_OK)
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
STDERR_LINE_AT_MOST = 200       # of which the last two are told, each cut to so many characters
REPLACED_SECONDS = 3            # for a program that is being replaced, or kept from starting otherwise, to be there again
END_SECONDS = 5                 # from the end of stdin to TERM [acp 10]
TERM_SECONDS = 2                # from TERM to KILL
GLANCE_SECONDS, AT_EXIT_SECONDS = 0.5, 0.01     # how often to look whether it has exited: with, and without its stdout
WRITABLE = select.EPOLLOUT | select.EPOLLET     # told once, and once more after each `modify`
LOCKS_BY_PID = "Kiro's locks name processes that can be seen from here"
NO_SIGN = re.compile(r".{0,3}|-.*|proc|python[\d.]*")      # words of KIRO_COMMAND by which Kiro is not known
MARK = "TG_ACP_BOT"              # in our children's environment: whose process it is, its own mark, and the bot's folder
MARKED = re.compile(rf"{MARK}=(\S+) (\S+) ([^\0]*)")
NOT_LOGGED_IN = re.compile(r"(?i)not\s+logged\s+in|authentication required|unauthori[sz]ed|ExpiredToken|InvalidGrant|"
                           r"TokenExpired|AccessDenied|'code': -32000\b")
PASSING = re.compile(r"(?i)throttl|too ?many ?requests|usage limit|timed out|rate.?limit|overloaded|high demand|quota|billing|"
                     r"\b(429|50\d)\b")           # another session would not help [acp 4.5, 11]
LOCKED = re.compile(r"active in another process \(PID (\d+)\)")
LOST = re.compile(r"(?is)session[^:;,]{0,80}(not found|does ?n.t exist|does not exist|unknown|no such|not exist)|"
                  r"(unknown|no such|invalid|missing) session|no session (with|by|for|of|named)|resource.not.found|"
                  r"no rollout found|thread not found|'code': -32002\b")
REFUSED_AGAIN_SECONDS = 3       # between two refusals in the same words that count as two
FRAME = {"method": "",
         "params": {"update": {"sessionUpdate": "", "toolCallId": "", "title": "", "kind": "", "status": ""}},
         "result": {"sessionId": "", "stopReason": "", "agentInfo": {}, "authMethods": [], "sessions": [],
                    "models": {"availableModels": []}, "configOptions": [],
                    "agentCapabilities": {"promptCapabilities": {}, "sessionCapabilities": {}}}}


class Models(NamedTuple):
    """The models that Kiro reports for a session."""
    offered: dict[str, str] = {}        # labels by id
    current: str = ""                   # id
    config_id: Optional[str] = None     # of session/set_config_option; None: session/set_model


class Process:
    """A child process and whatever that starts.  One thread, the keeper, does all that is to be done for them: it writes what
    is sent, hands lines to `_take`, keeps the end of stderr, and sees them to their end, which it tells by `_part`."""

    def __init__(self, settings, command, folder):
        """Start it.  Raises OSError."""
        self.mark = secrets.token_hex(6)         # in its environment
        self.wrote_at = time.monotonic()
        self.gone = threading.Event()            # the process and all it left behind have ended
        self.trouble = ""                        # why it had to be ended
        self.stderr = ""                         # the end of what it said there
        self._line = bytearray()                 # the beginning of one that has not ended yet
        self._outgoing = bytearray()
        self._stdin_ends = False                 # after that
        self._end_at = math.inf                  # when it is ended; 0: it has ended by itself
        self._epoll = select.epoll()
        self._work = {}                          # by descriptor: the method to call when that is ready
        self._popen = subprocess.Popen(command, cwd=folder, umask=settings.umask, env=_child_environment(settings, self.mark),
                                       start_new_session=True, bufsize=0,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid = self._popen.pid
        try:
            threading.Thread(target=self._keep, name=f"keeper of {self.pid}", daemon=True).start()
        except RuntimeError as error:            # no thread to be had: nobody would see to its end
            self._bury()
            raise OSError(0, str(error)) from error

    def send(self, data: bytes):
        """Have this written."""
        self._outgoing += data
        try:
            self._epoll.modify(self._popen.stdin, WRITABLE)      # wakes the keeper, now or when there is room
        except (OSError, ValueError):            # closed, or not registered yet
            pass

    def end(self, patience: float = math.inf):
        """Close stdin, which is the clean way [acp 4.1]; TERM after `patience` seconds, then KILL."""
        self._end_at = min(self._end_at, time.monotonic() + patience)
        self._stdin_ends = True
        self.send(b"")

    def is_deaf(self) -> bool:
        """Are there bytes in the pipe that it has not read?"""
        try:
            return any(fcntl.ioctl(self._popen.stdin, termios.FIONREAD, bytes(4)))
        except (OSError, ValueError):    # closed
            return False

    def _how_it_ended(self):
        """Return the exit status, and the end of stderr."""
        if self.trouble:
            return self.trouble
        code = self._popen.returncode
        name = f"exit status {code}" if code >= 0 else f"signal {-code}"
        said = [line.strip()[:STDERR_LINE_AT_MOST] for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()]       # the last may stand above the usage
        told = dict.fromkeys(errors[-1:] + said[-2:])
        return f"{name}: {'; '.join(told)}" if told else name

    # -- on the keeper's thread ----------------------------------------------------------------------------------------

    def _keep(self):
        popen = self._popen
        try:
            os.set_blocking(popen.stdin.fileno(), False)
            for pipe, events, work in ((popen.stdin, WRITABLE, self._write), (popen.stdout, select.EPOLLIN, self._read),
                                       (popen.stderr, select.EPOLLIN, self._drain)):
                self._epoll.register(pipe, events)
                self._work[pipe.fileno()] = work
            while (left := self._end_at - time.monotonic()) > 0:
                self._attend(left)
            end_processes(self.owns, TERM_SECONDS, self._attend)
            for _ in range(64):                  # more than the pipes can hold of its last words
                self._attend(0)
            if self._line:                       # it never ended, and what is dying may still hold the pipe open
                self._take(self._line)
        except Exception:   # a bug: no place must be lost with it
            log.exception("The keeper of %s has failed", self.pid)
        finally:
            self._bury()
            self._part()

    def _close(self, pipe):
        self._epoll.unregister(pipe)     # closing does not do it while a process that is just being started has a copy
        pipe.close()

    def _attend(self, seconds):
        """Do what there is to do, or wait for it so long."""
        ready = self._epoll.poll(min(seconds, AT_EXIT_SECONDS if self._popen.stdout.closed else GLANCE_SECONDS))
        for descriptor, _ in ready:
            self._work[descriptor]()
        if not ready and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            self._end_at = 0             # it is not reaped: until all is over, its pid must not become another's

    def _write(self):
        """Write as much as the pipe takes."""
        try:
            while self._outgoing and (written := self._popen.stdin.write(self._outgoing[:65536])):
                self.wrote_at = time.monotonic()
                del self._outgoing[:written]
            if self._stdin_ends and not self._outgoing:
                self._close(self._popen.stdin)
        except OSError:          # it has exited, or does not listen any more
            self._close(self._popen.stdin)

    def _read(self):
        """Take what it says; without stdout it is of no use any more."""
        data = self._popen.stdout.read(65536)
        self._line += data
        if b"\n" in data:
            *lines, self._line = self._line.split(b"\n")
            for line in lines:
                self._take(line)
        if len(self._line) > LINE_AT_MOST:
            self.trouble = f"a line of more than {LINE_AT_MOST >> 20} MB"
        if not data or self.trouble:
            self._close(self._popen.stdout)
            self.end(patience=0.5)

    def _drain(self):
        data = self._popen.stderr.read(65536)
        self._keep_words(data)
        if not data:
            self._close(self._popen.stderr)

    def _keep_words(self, data):
        said = re.sub(r"\x1b\[[\d;]*m", "", self.stderr + data.decode(errors="replace"))     # without colours
        self.stderr = said[-STDERR_KEPT:]

    def owns(self, pid: int) -> bool:
        """Is that process this one, or of those that it has started?  kiro-cli does not pass signals on [acp 4.2]."""
        try:                                     # looked at for every process of the machine, several times a turn
            return os.getpgid(pid) == self.pid or _marks(pid)[1] == self.mark
        except ProcessLookupError:
            return False

    def _bury(self):
        """Leave nothing: no process, no descriptor."""
        _kill(-self.pid, signal.SIGKILL)         # nobody is left whom the keeper could see to the end
        with self._popen:                        # closes the pipes, and reaps it
            pass
        self._epoll.close()
        self.gone.set()


class Transcriber(Process):
    """The owner's command, which prints what is said in a recording."""

    def __init__(self, conversation: Conversation, path: str, workspace: str):
        """Start it.  Raises OSError, ValueError."""
        self._conversation, self._said = conversation, b""
        settings = conversation.bot.settings
        super().__init__(settings, [*settings.transcribe_command, path], workspace)
        self.end(patience=TRANSCRIBE_SECONDS)

    def text(self) -> str:
        """Return what it prints, when it is gone.  Raises ValueError that says why that is of no use, Stopped, Closing."""
        try:
            while not self.gone.is_set():
                self._conversation.wait(math.inf)
        finally:
            self.end(patience=0)
        text = self._said.decode(errors="replace").strip()
        if self._popen.returncode or not text:
            raise ValueError(f"no text within {TRANSCRIBE_SECONDS} s: {self._how_it_ended()}")
        return text

    def _take(self, line):
        self._said += line + b"\n"
        if len(self._said) > TRANSCRIPT_AT_MOST:       # nobody talks so much
            self._said = b""
            self.end(patience=0)

    def _part(self):
        self._conversation.post("wake")


def end_processes(are_meant: Callable, seconds: float, wait: Callable = time.sleep):
    """TERM for all processes that are meant, and for those that do not end within so many seconds KILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        told = set()
        limit = time.monotonic() + seconds
        while found := _running(are_meant):    # a look may take longer than there is time
            for pid in found - told:
                _kill(pid, number)
            if time.monotonic() >= limit:
                break
            told |= found
            wait(0.02)


def _kill(pid, number):
    try:
        os.kill(pid, number)
    except OSError:      # it is gone, or another user's
        pass


class Kiro(Process):
    """A Kiro process.  Its frames are posted to its conversation, in order, as events:
    ("response", kiro, frame), ("question", kiro, method, id, params), ("notification", kiro, method, params), ("exit", kiro).

    It has a place, which is given back when nothing of it is left.
    """

    def __init__(self, conversation, workspace):
        """Start the process and list it.  Raises OSError, and Closing."""
        self._conversation = conversation
        self.workspace = workspace
        self.heard_at = time.monotonic()
        self.agent = None                        # its answer to initialize
        self.session_id = ""                     # once it is loaded
        self.model = ""                          # that it uses, as far as is known
        self.is_told = False                     # of the bot's tags, by this prompt
        self.exit_noticed = False                # by the conversation, which had handled all earlier frames then
        self.sign_ins = set()                    # addresses that the user was told
        self.responses = {}                      # by request id
        self.open_prompt = 0                     # the id of the prompt that has no response yet
        self.replayed_before_response = False
        self._last_id = 0
        bot = conversation.bot
        with bot.spawning:
            if bot.closing.is_set():
                raise Closing
            super().__init__(bot.settings, bot.settings.kiro_command, workspace)
            bot.processes.add(self)

    # -- to Kiro: nothing here waits, the keeper does ------------------------------------------------------------------

    def request(self, method: str, params: dict) -> int:
        """Send a request; return its id.  The response comes as an event."""
        self._last_id += 1
        self._send({"id": self._last_id, "method": method, "params": params})
        return self._last_id

    def prompt(self, blocks: list[dict]) -> int:
        """Begin a turn; until its response, updates and permission requests are let through."""
        self.open_prompt = self._last_id + 1
        return self.request("session/prompt", {"sessionId": self.session_id, "prompt": blocks})

    def result(self, request_id: int) -> dict:
        """Return the result that has come for a request.  Raises KiroRefusal."""
        frame = self.responses.pop(request_id)
        if "error" in frame:
            raise KiroRefusal(frame["error"])
        return frame.get("result", {})

    def respond(self, request_id, result: dict):
        """Answer a request of Kiro's."""
        self._send({"id": request_id, "result": result})

    def cancel(self):
        """Ask Kiro to end the turn, if there is one."""
        if self.open_prompt:
            self._send({"method": "session/cancel", "params": {"sessionId": self.session_id}})

    def _send(self, frame):
        self.send(json.dumps({"jsonrpc": "2.0", **frame}).encode() + b"\n")

    # -- from Kiro -----------------------------------------------------------------------------------------------------

    def can(self, what: str) -> bool:
        """Does the agent say that it can do this: "loadSession", or take "image" blocks?"""
        able = self.agent.get("agentCapabilities", {})
        return bool(able.get(what) or able.get("promptCapabilities", {}).get(what))

    def _take(self, line):
        """Pass one frame on: a response, a request, a notification, or junk [acp 2].  Only what was agreed on may be asked."""
        try:
            frame = as_dict(json.loads(line))
        except (ValueError, RecursionError):     # maybe its last words
            return self._keep_words(line[:STDERR_LINE_AT_MOST] + b"\n")
        self.heard_at = time.monotonic()
        _shape(frame, FRAME)
        method, params, number = frame.get("method"), frame.get("params", {}), frame.get("id")
        if method is None:
            if type(number) is int:
                if number == self.open_prompt:
                    self.open_prompt = 0
                self._conversation.post("response", self, frame)
        elif "id" not in frame:
            if self._is_of_interest(method, params):
                self._conversation.post("notification", self, method, params)
        elif method in QUESTIONS:
            self._conversation.post("question", self, method, number, params)
        else:
            self._send({"id": number, "error": {"code": -32601, "message": f"Method not found: {method}"}})

    def _is_of_interest(self, method, params):
        """What is said outside a turn is replay, and so is dropped here; extensions may come at any time."""
        mine, kind = params.get("sessionId") in (None, self.session_id), params.get("update", {}).get("sessionUpdate")
        if method.startswith("_kiro"):
            return mine or not self.session_id
        self.replayed_before_response |= not self.session_id and kind in ("user_message_chunk", "agent_message_chunk")
        return mine and method == "session/update" and (self.open_prompt or kind == "available_commands_update")

    def failure(self) -> KiroFailure:
        """Return the failure to raise when the process has gone.  Wrong usage is not worth a second try."""
        again = self._popen.returncode != 2 and not self.trouble
        return KiroFailure(EXITED.format(self._how_it_ended()), again, said=self.stderr)

    def _part(self):
        bot = self._conversation.bot
        bot.places.give_back(self._conversation)
        self._conversation.post("exit", self)
        with bot.spawning:                       # it may not be listed yet
            bot.processes.discard(self)


def _shape(value, example):
    """Take out of what an agent says whatever is not of the example's type; the rest of the code trusts these."""
    for key in example.keys() & value.keys():
        if type(value[key]) is not type(example[key]):
            del value[key]
        elif example[key]:
            _shape(value[key], example[key])


def _child_environment(settings, mark):
    """Return a child's environment: ours without the token, with the mark by which a later run knows its orphans, and
    without git finding the bot's own checkout above a topic's own folder."""
    secret = settings.token or "\0"
    env = {name: value for name, value in os.environ.items() if secret not in value}
    # The bot's folder too: WORKSPACE_BASE_PATH may have been another one when the thread began.
    return {**env, "GIT_CEILING_DIRECTORIES": f"{settings.workspaces}:{settings.folder}",
            MARK: f"{_identity(os.getpid())} {mark} {settings.folder}"}


def finite(value) -> Optional[float]:
    """Return a number that can be reckoned with and shown, or None: JSON's may be of any size."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else None


def as_dict(value) -> dict:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def without_none(value) -> dict:
    """Return what an object says, without what it leaves open."""
    return {name: field for name, field in as_dict(value).items() if field is not None}


def as_list(value) -> list:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def is_login(failure: KiroFailure) -> bool:
    """Is it that nobody is logged in?"""
    return bool(NOT_LOGGED_IN.search(failure.said))


# -- locks and lost sessions -------------------------------------------------------------------------------------------

def kiro_home() -> Path:
    """Return where Kiro keeps what is its own."""
    return Path(os.environ.get("KIRO_HOME") or os.path.expanduser("~/.kiro"))


def session_file(session_id: str, extension: str) -> Path:
    """Return where Kiro keeps one of a session's files [acp 4.1]; quoted, as an id could lead elsewhere."""
    return kiro_home() / f"sessions/cli/{quote(session_id, safe='')}.{extension}"


def _size_of(session_id, extension):
    """Return the size of one of a session's files: -1 when it is not there, None when that can't be seen from here."""
    path = session_file(session_id, extension)
    try:
        return path.stat().st_size
    except OSError:
        return -1 if os.access(path.parent, os.X_OK) else None


def is_in_sight(session_id: str) -> bool:
    """Can Kiro's file of the session be seen from here?"""
    return (_size_of(session_id, "json") or 0) > 0


def has_vanished(session_id: str, facts: SessionFacts) -> bool:
    """Is it plain to see that Kiro has no such session any more?  Not where its sessions were out of sight before."""
    return (facts.in_sight or not facts.ended) and _size_of(session_id, "json") == -1


def is_empty(session_id: str) -> bool:
    """Is it plain to see that Kiro kept nothing of the session?  Such a one need not load [acp 3.3]."""
    return _size_of(session_id, "jsonl") == 0


def is_ours(pid: int) -> bool:
    """Has this process started it, or what it has started?"""
    owner = _marks(pid)[0]
    return owner != "" and owner == _identity(os.getpid())


def end_orphans(folder: Path):
    """End all that former runs of this folder's bot have left behind."""
    def is_orphan(pid):
        owner, _, its_folder = _marks(pid)     # not this bot itself, if Kiro has started it
        return its_folder == str(folder) and owner != _identity(owner.partition(".")[0]) and pid != os.getpid()

    if pids := _running(is_orphan):
        log.warning("Ending what a former run has left behind: processes %s", pids)
        end_processes(is_orphan, TERM_SECONDS)


def runs_as_kiro(pid: int, settings: Settings) -> bool:
    """Does the process run, and as Kiro?  The pid in a lock may have been given to another program since [acp 4.1]."""
    command_line = os.fsdecode(_proc(pid, "cmdline")).lower()
    names = [os.path.basename(word).lower() for word in ["kiro", *settings.kiro_command]]
    return any(name in command_line for name in names if not NO_SIGN.fullmatch(name))


def remove_lock(session_id: str, pid: int):
    """Remove the session's lock if it names this process, which is dead or no Kiro, or nobody: its writing was cut off."""
    try:
        if lock_pid(session_id) in (pid, None):
            session_file(session_id, "lock").unlink(missing_ok=True)
            log.info("Removed the lock that process %s left on session %s", pid, session_id)
    except OSError as error:
        log.error("A dead lock can't be removed: %s", error)


def lock_pid(session_id: str) -> Optional[int]:
    """Return the process that the session's lock names; None when there is no lock that could be understood."""
    try:
        return int(json.loads(session_file(session_id, "lock").read_text())["pid"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


# -- processes, by /proc -----------------------------------------------------------------------------------------------

STATE, START_TIME = 0, 19     # fields of /proc/PID/stat after the name


def _proc(pid, name):
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _identity(pid):
    """Return what tells a process that runs from all others, also from later ones with its pid; nothing of a zombie."""
    fields = os.fsdecode(_proc(pid, "stat")).rpartition(")")[2].split()
    return f"{pid}.{fields[START_TIME]}" if fields and fields[STATE] not in ("Z", "X") else ""


def _marks(pid):
    """Return by whom it was started, its mark and the bot's folder; nothing when it is not ours, or not ours to see."""
    found = MARKED.search(os.fsdecode(_proc(pid, "environ")))
    return found.groups() if found else ("", "", "")


def _running(are_meant):
    """Return the running processes that are meant."""
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    return {pid for pid in pids if are_meant(pid) and _identity(pid)}


# ======================================================================================================================
# Answer: what Kiro says, as it comes and as it stays
# ======================================================================================================================

ANSWER_SECONDS = 30             # how long to insist on a part of an answer, which is five tries; it is held after that
ONCE = 0.01                     # and on one that is held already
HOLD_SECONDS = 30               # until what is held is tried again; a try later so much longer


class Answer:
    """What Kiro has said and done in a turn: frames in, text out.  It knows no clock and no thread."""

    def __init__(self):
        self.length = 0                        # characters
        self.heard = False                     # text, a tool call or a permission request came
        self.has_ended = False                 # Kiro has said so, and the response may not come
        self.running = ""                      # the title of the tool that was heard of last, while it runs
        self.steps = 0                         # tool calls begun
        self.plan = []                         # its entries: what, and pending, in_progress or completed
        self.trouble = ""                      # Kiro's last word about limits, retries and compaction
        self.credits = None                    # what it cost, if Kiro told
        self._pieces = []                      # of its text
        self._files = []                       # what it sent beside the text, as parts
        self._attempt = 0                      # how many pieces were there when Kiro's present attempt began
        self._gap = False                      # a tool or the like lies between the last piece and the next
        self._message_id = None                # of the last piece, where the agent tells
        self._tools = {}                       # calls that have not ended, by id
        self._last_tool = ""                   # the last one that did, and how
        self._changes = {}                     # by file: what Kiro's tools did to it, as lines with - and +

    def hear(self, method: str, params: dict):
        """Take in a notification; what says nothing about the answer is left aside [acp 3.5, 3.8]."""
        update = as_dict(params.get("update")) or params       # ACP's own, or an extension's
        kind = update.get("sessionUpdate") or method.removeprefix("_kiro.dev/")
        if kind == "agent_message_chunk" and self.length <= ANSWER_AT_MOST:
            before, self._message_id = self._message_id, update.get("messageId", self._message_id)
            self._gap |= before != self._message_id
            self._hear_block(as_dict(update.get("content")))
        elif kind in ("tool_call", "tool_call_update"):
            self._hear_tool(update)
        elif kind == "plan":
            self._gap, entries = True, map(as_dict, as_list(update.get("entries")))
            self.plan = [(one_line(str(entry.get("content")), PLAN_WIDTH), str(entry.get("status"))) for entry in entries]
        elif kind == "turn_end":
            self.has_ended = True
        elif kind == "stream_discarded":           # Kiro starts its present attempt anew
            del self._pieces[self._attempt:]
            self._gap = True
        elif kind == "metadata" and (usage := as_list(update.get("meteringUsage"))):
            self.credits = sum(finite(as_dict(entry).get("value")) or 0 for entry in usage)
        elif kind in ("error/rate_limit", "retry_warning", "stream_stall_notice"):
            self.trouble = str(update.get("message") or TRIES_AGAIN)
        elif kind == "compaction/status":          # of /compact, or by itself; a turn may say nothing else
            status = as_dict(update.get("status"))
            self.trouble = COMPACTION.get(str(status.get("type")), "").format(status.get("error") or "")

    def _hear_block(self, block):
        """Take in a piece of the answer: text, a link, or what is sent as a file."""
        inner = as_dict(block.get("resource")) or block
        text, data, uri = (str(inner.get(key) or "") for key in ("text", "data", "uri"))
        path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else ""
        self.length += len(text) + len(data)
        self.heard = True
        if text:
            self._say(text)
        elif data or path:
            name = f"image{mimetypes.guess_extension(str(inner.get('mimeType'))) or ''}"
            self._files.append({"kind": "file", "path": path or name, "caption": "", "data": data})
        elif uri:
            self._say(f"\n\n[{block.get('name') or uri}]({uri})\n\n")

    def _say(self, text):
        """Add a piece of the answer, set apart when a tool lies between."""
        if self._gap and self._pieces:
            self._pieces[-1] = self._pieces[-1].rstrip("\n") + "\n\n"
        self._pieces.append(text)
        self._gap, self.running, self.trouble = False, "", ""
        self.has_ended = text.strip() == INTERRUPTED

    def _hear_tool(self, update):
        """A tool call begins, tells something, or ends; v2 gives no status at its beginning."""
        self.steps += update.get("sessionUpdate") == "tool_call"
        tool_id = str(update.get("toolCallId"))
        call = self._tools.pop(tool_id, {}) | without_none(update)
        title, status = str(call.get("title") or call.get("kind") or SOME_TOOL), update.get("status")
        if status in ("completed", "failed"):
            if title == self.running:
                self.running = ""
            self._last_tool = "\n".join([f"{title}: {status}", *_content_texts(call.get("content"))])
            if status == "completed" and call.get("kind") in ("edit", "delete", "move"):
                self._note_changes(call)
        else:
            self._tools[tool_id] = call
            self.running = title
            if len(self._tools) > TOOLS_KEPT:
                del self._tools[next(iter(self._tools))]
        self.heard = self._gap = True
        self.has_ended = False
        self._attempt = len(self._pieces)

    def _note_changes(self, call):
        """Note what a tool call did to files: the lines of its diffs, or at least their names."""
        diffs = [block for block in as_list(call.get("content")) if as_dict(block).get("type") == "diff"]
        for block in map(as_dict, diffs or as_list(call.get("locations")) or [call.get("rawInput")]):
            if block.get("path"):
                path, *changed = _content_texts([{**block, "type": "diff"}])
                if sum(map(len, self._changes.values())) > CHANGES_AT_MOST:
                    changed = []
                self._changes[path] = "\n".join([self._changes.get(path, ""), *changed])

    def changes(self) -> str:
        """Return the files that were changed by Kiro's own tools, each with what went and what came."""
        texts = [f"{path}  +{text.count(NEW)} -{text.count(OLD)}{text}" for path, text in self._changes.items()]
        return counted("\n\n".join(texts), CHANGES_AT_MOST)

    def _closing(self, seconds):
        """Return the line that says what the turn took and did; nothing for a short one that changed no file."""
        if seconds < LONG_SECONDS and not self._changes:
            return ""
        counts = (self.steps, STEPS), (len(self._changes), FILES), (self.credits, COST)
        return " · ".join([duration(seconds), *(forms[n > 1].format(n) for n, forms in counts if n)])

    def progress(self) -> list[str]:
        """Return how far it is: the step from the second on, and of a plan how much is done and what comes now."""
        left = [what for what, status in self.plan if status != "completed"]
        plan = " ".join([f"{len(self.plan) - len(left)}/{len(self.plan)}", *left[:1]])
        return [STEP.format(self.steps)] * (self.steps > 1) + [plan] * bool(self.plan)

    def text(self) -> str:
        """Return what Kiro has said so far."""
        return whole_characters("".join(self._pieces)).replace("\r\n", "\n").strip("\n")

    def describe(self, tool_call: dict) -> str:
        """Return the question about a tool call: what it is, and each of its arguments, in plain sight."""
        before = self._tools.get(str(tool_call.get("toolCallId")), {})
        call = before | without_none(tool_call)
        title, kind, raw = str(call.get("title") or SOME_TOOL), str(call.get("kind") or "other"), call.get("rawInput")
        named = "" if kind in ("other", "execute") or kind in title.lower() else f" ({kind})"
        lines = [WANTS_TO.format(title + named)]
        for name, value in as_dict(raw).items() or [("", raw)] * bool(raw):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if text not in (title, title.partition(": ")[2]):
                lines.append(f"{name}: {text}" if name else text)
        for told in tool_call, before:
            lines += _content_texts(told.get("content"))
        shown = "\n".join(map(counted, dict.fromkeys(lines)))
        paths = (str(as_dict(place).get("path") or "") for place in as_list(call.get("locations")))
        return counted("\n".join([shown, *(path for path in paths if path not in shown)]), QUESTION_LIMIT)

    def parts(self, outcome: Outcome, notes: str, seconds: float) -> list[dict]:
        """Return the whole answer for the journal: notes, what Kiro said, remarks."""
        text, closing, said, remarks = self.text(), self._closing(seconds), self._files, [outcome.remark]
        if text.strip():
            end = paragraphs(remarks.pop(0) if outcome.stopped else "", closing)
            said, closing = [{"kind": "answer", "text": text, "end": end}, *said], ""
        if self.length > ANSWER_AT_MOST:
            remarks.append(TOO_LONG)
        if not (said or any(remarks)):
            remarks.append(self.trouble or self._last_tool or NOTHING_SAID)
        notes, remark = (parts_of(counted(text, QUESTION_LIMIT)) for text in (notes, paragraphs(*remarks, closing)))
        return notes + said + remark


def _content_texts(content):
    """Yield what a tool call's content shows: texts, and of changed files what lies between the same beginning and end."""
    for block in map(as_dict, as_list(content)):
        text = as_dict(block.get("content")).get("text")
        if isinstance(text, str):
            yield text
        elif block.get("type") == "diff":
            yield str(block.get("path"))
            old, new = (str(block.get(key) or "").splitlines() for key in ("oldText", "newText"))
            for _ in range(2):                 # the same beginning; then, from behind, the same end
                same = len(os.path.commonprefix([old, new]))
                old, new = old[same:][::-1], new[same:][::-1]
            for sign, lines in (("-", old), ("+", new)):
                if lines:
                    yield "\n".join(f"{sign} {line}" for line in lines)


def counted(text: str, limit: int = ARGUMENT_LIMIT) -> str:
    """Return the text in plain sight, or its beginning and how much more there is."""
    more = MORE_TEXT.format(len(text) - limit) * (len(text) > limit)
    return in_plain_sight(text[:limit]) + more


def plan_lines(plan: list[tuple[str, str]]) -> list[str]:
    """Return a plan's entries with their signs, as far as one wants to read them."""
    lines = [f"{PLAN_SIGNS.get(status, '☐')} {what}" for what, status in plan[:PLAN_LENGTH]]
    return lines + [MORE_STEPS.format(len(plan) - PLAN_LENGTH)] * (len(plan) > PLAN_LENGTH)


class Draft:
    """A turn's streamed preview.  Used on the conversation's thread; `stopped` is set under its lock."""

    def __init__(self, chat):
        self._chat = chat
        self.id = random.randint(1, 2**31 - 1)
        self.stopped = False                   # by its button: Telegram wants no more frames of it [tg 1.3]
        self._shown = None                     # the answer's length and the status in its last frame
        self._sent_at = 0.0                    # when that was

    def hide(self):
        """A message in the topic has taken its place [tg 1.5]."""
        self._shown = None

    def refresh(self, answer: Answer, doing: str, clock: str) -> float:
        """Send a frame if there is news (the `clock` is none), or the last one expires soon; return when to look again."""
        now, news = time.monotonic(), (answer.length, doing)
        if self.stopped:
            return math.inf
        if news == self._shown and now < self._sent_at + KEEP_ALIVE_SECONDS:
            return self._sent_at + KEEP_ALIVE_SECONDS
        if wait := self._chat.frame_wait(self._sent_at, now):
            return now + wait
        self._sent_at = now
        said, _ = visible_text(answer.text(), still_coming=True)
        self._shown = news if self._chat.frame(self.id, said, (doing + clock).removeprefix(" · ")) else None
        return time.monotonic()


class Outgoing(NamedTuple):
    """An answer on its way."""
    turn_id: Optional[int]
    parts: list[dict]                          # what is left of it
    offer: bool
    former: bool = False                       # a former run may have died of formatting it


class Delivery:
    """Brings a topic's answers to Telegram, part by part, also those of a former run.  On the conversation's thread.

    A part is one lasting message: {"kind": "plain" | "rich" | "source", "text"}, where source is Markdown to be shown as plain
    text; or {"kind": "file", "path", "caption", "data"?, "text"?}, whose bytes are at the path, or in it, as base64 or as text
    that can be shown instead; {"kind": "answer", "text", "end"?} is what Kiro said, not yet cut and made safe.
    """

    def __init__(self, conversation):
        self._conversation, self._bot = conversation, conversation.bot
        self._store, self._chat = conversation.store, conversation.chat
        self.held: list[Outgoing] = []         # what Telegram did not take, oldest first
        self.tries = 0                         # how often that was in a row
        self.try_at = math.inf                 # when to try what is held again
        self.sending = False                   # a part is on its way, and not ticked off yet; read by the main thread
        self.unsent = []                       # files that could not be sent, for Kiro to hear of

    def send(self, outgoing: Outgoing):
        """Send what is left, the journal keeping up with it; hold what Telegram does not take, else try what is held."""
        self.sending = True
        try:
            while True:
                left = [json.dumps(part) for part in outgoing.parts]
                # if that can't be, it is sent all the same
                self._bot.attempt(self._store.answer, outgoing.turn_id, left, outgoing.offer)
                if not left:
                    break
                outgoing.parts[:1] = self._send_first(outgoing)
        except TelegramError as error:
            return self._hold(outgoing, error)
        finally:
            self.sending = False
        if outgoing in self.held:
            self.held.remove(outgoing)
        self.tries, self.try_at = 0, time.monotonic() if self.held else math.inf
        self._bot.note(self._store.finish, outgoing.turn_id, outgoing.offer)

    def _hold(self, outgoing, error):
        """Keep it, to be tried again behind whatever comes next in the topic."""
        log.error("An answer to %s/%s is held: %s", *self._conversation.key, error)
        self.tries += 1
        self.try_at = time.monotonic() + getattr(error, "seconds", HOLD_SECONDS * self.tries)
        if outgoing not in self.held:
            self.held.append(outgoing)
            if isinstance(error, Refused):
                self._bot.tell(self._conversation.key, NOT_TAKEN.format(error.description), silent=True)

    def try_again(self):
        """Try once to send what is held, each answer in its turn."""
        for outgoing in list(self.held):
            self.send(outgoing)

    def give_up(self):
        """Drop the part that Telegram does not take, and go on with what comes after it."""
        if self.held:
            del self.held[0].parts[:1]
            self.try_at = time.monotonic()
            self._bot.tell(self._conversation.key, GIVEN_UP, silent=True)

    def _pieces(self, answer, former):
        """Return the messages and files that an answer becomes; those of text as it is, where a former run died of this."""
        text, folder = answer["text"], self._conversation.agent.workspace
        try:
            if not former:
                shown, files = visible_text(text, exists=lambda path: os.path.lexists(os.path.join(folder(), path)))
                shown = paragraphs(shown, answer.get("end"))
                files = [{"kind": "file", "path": path, "caption": caption} for path, caption in files]
                return self._chat.parts(shown) + files or parts_of(NOTHING_SAID)
        except Exception:   # a bug there must not cost an answer
            log.exception("An answer can't be formatted and is sent as it is")
        return [plain_part(piece) for piece in util.smart_split(text, PLAIN_LIMIT // 2) if piece.strip()]

    def _send_first(self, outgoing):
        """Send the first part, which rings if it is the only one; return what Telegram is to get instead of it."""
        part, *others = outgoing.parts
        if part["kind"] == "answer":
            return self._pieces(part, outgoing.former)
        if part["kind"] == "file":
            return self._send_file(part, silent=bool(others))
        is_last = all(other["kind"] == "file" for other in others)
        return self._chat.send(part, self._buttons(outgoing) if is_last else [], disable_notification=bool(others),
                               seconds=ONCE if outgoing in self.held else ANSWER_SECONDS)

    def _buttons(self, outgoing):
        """Return the buttons of an answer's last message; none for a turn that could not be journaled."""
        turn_id, conversation = outgoing.turn_id, self._conversation
        if not turn_id:
            return []
        rows = [[(ASK_AGAIN, f"again:{turn_id}"), (DROP, f"drop:{turn_id}")]] * outgoing.offer
        changed = [(str(turn_id), CHANGES)] if conversation.changes.get(str(turn_id)) else []
        return rows + choices(conversation, "changes", changed)

    def _send_file(self, part, silent):
        """Send a file; return what goes in its place: a message if that can't be, two if the caption is too long for one."""
        if utf16_length(part["caption"]) > CAPTION_LIMIT:
            return [{**part, "caption": ""}, *parts_of(part["caption"])]
        refusal = self.upload(part, silent)
        if not refusal:
            return []
        if "text" in part:
            return parts_of(part["text"], "source")
        self.unsent.append(f"{part['path']}: {refusal}")
        return parts_of(FILE_NOT_SENT.format(part["path"], refusal))

    def upload(self, part: dict, silent: bool) -> str:
        """Send a file of the topic's folder, or one that came in the answer; return why not, or nothing.  On any thread."""
        path = part["path"]
        try:
            content = part["text"].encode() if "text" in part else base64.b64decode(part.get("data", ""))
            with io.BytesIO(content) if content else _open_inside(path, self._conversation.agent.workspace()) as file:
                self._chat.upload(file, path, part["caption"], silent)
        except FileNotFoundError:
            return NO_SUCH_FILE
        except (Refused, OSError, ValueError, StoreError, KiroFailure) as error:
            return CANT_BE_SENT.format(error)
        return ""

    def card(self, unfinished: UnfinishedTurn) -> list[dict]:
        """Return what Kiro had said, and the message that offers the turn again."""
        asked = [words(Incoming(row).message) or ONLY_A_FILE for row in self._store.messages_of(unfinished.turn_id)]
        said = [{"kind": "answer", "text": unfinished.partial}] if unfinished.partial else []
        return said + parts_of(WORKED_ON.format(one_line(" / ".join(asked), EXCERPT_LENGTH)))


def _open_inside(path, workspace):
    """Open a regular file inside the workspace, links resolved.  Raises OSError, ValueError."""
    found = os.open(os.path.join(workspace, path), os.O_PATH)      # only looked at, so that no link can change meanwhile
    try:
        seen = f"/proc/self/fd/{found}"
        if not Path(os.readlink(seen)).is_relative_to(os.path.realpath(workspace)):
            raise ValueError(OUTSIDE)
        if not os.path.isfile(seen):
            raise ValueError(NOT_REGULAR)
        return open(seen, "rb")
    finally:
        os.close(found)


# ======================================================================================================================
# Reply: the one door to Telegram, a chat's pace, drafts and lasting messages
# ======================================================================================================================

FRAME_SECONDS = 1.5             # between two frames of a chat, over all its topics [tg 1.4]
TIMEOUTS = {"sendMessageDraft": (3, 4), "getUpdates": None}   # seconds to connect, to read; None: telebot's
TIMEOUT = (10, 30)
UPLOAD_TIMEOUT = (10, 300)
KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)]
RETRY_AT_MOST = 30              # seconds between two tries
GET_FILE_SECONDS = 60
CHUNK = 64 * 1024
TYPING_SECONDS = 4              # between signs of life where there are no drafts; one lasts for five
SAY_SECONDS = 600               # how long to insist on a message of the bot's own
FLOOD_SECONDS = 5               # for a 429 that doesn't say how long
FLOOD_AT_MOST = 24 * 3600
PLAIN_LIMIT = 4096              # UTF-16 units [tg 2.4]
RICH_LIMITS = (30_000,          # of 32768 UTF-16 units [tg 2.1], of source; what makes it safe adds a little
               6000,            # where a blank line allows it: clients were seen to cut longer ones
               480)             # of 500 blocks, with room for a list or a table that goes on [tg 2.1]
PARTS_AT_MOST = 20              # of an answer; of a longer one some are shown at both ends, and all of it goes as a file
PARTS_SHOWN = 3
TOO_MUCH = re.compile("too long|TEXT_TOO_LONG|BLOCKS_TOO_MANY")    # a smaller part may be taken [tg 2.2]
HALVED_AT_LEAST = 1000          # a part that is refused although it is smaller goes plain
DRAFT_LIMIT = 4000
CAPTION_LIMIT = 1024
TITLE_LIMIT, LABEL_LIMIT = 40, 60        # characters
UPLOAD_MB, LOCAL_UPLOAD_MB = 50, 2000
NO_PREVIEW = types.LinkPreviewOptions(is_disabled=True)
NO_DRAFTS = re.compile(r"^404|^400.*method|TEXTDRAFT")         # a server that does not know them
ABOUT_TOPIC = re.compile(r"(?i)thread|TOPIC_|rights")       # in a refusal; there are more ways to say it

Buttons = list[list[tuple]]              # rows of (label, data), or (label, what telebot's button gets instead of data)


class Link(str):
    """An address that a button opens."""


class TelegramError(Exception):
    """Something was not done."""


class Refused(TelegramError):
    """Telegram's definite no."""

    def __init__(self, code, description):
        super().__init__(f"{code} {description}")
        self.code, self.description = code, description


class Unauthorized(TelegramError):
    """The token is not (any longer) valid, whatever was asked."""
    code = 401


class Conflict(Refused):
    """Somebody else gets this bot's updates."""


class Unreachable(TelegramError):
    """No definite answer: no connection, a timeout, a server's fault.  What was sent may have arrived."""


class Fault(Unreachable):
    """A server's fault, and the server says so, with a 5xx or in words."""


class TooManyRequests(TelegramError):
    """Telegram wants silence in this chat for some seconds."""

    def __init__(self, seconds):
        super().__init__(f"flood control: {seconds:g} s")
        self.seconds = seconds


class Telegram:
    """The one door to Telegram.  It alone knows the token, telebot's errors and flood control.  Parameters travel in the
    request's body, since telebot would put them, and so whole messages, into the URL [tg 5.6]."""

    def __init__(self, settings, closing):
        self._token, self._closing = settings.token, closing
        self.is_local = settings.api_url != TELEGRAM_API
        self.rich, self.drafts = settings.rich_messages, True      # until the server turns out not to know them
        self._closed_until = defaultdict(float)        # by chat: Telegram wants silence
        self.next_frame = defaultdict(float)   # by chat: over all its topics
        self._session = requests.Session()     # one for all threads: a new thread finds connections that are open
        urllib3.connection.HTTPConnection.default_socket_options += KEEP_ALIVE     # so that no NAT drops them
        self._files = f"{settings.api_url}/file/bot{settings.token}/"
        apihelper.API_URL = settings.api_url + "/bot{0}/{1}"
        apihelper.CUSTOM_REQUEST_SENDER = self._post

    def call(self, method: Callable, *args, chat: Optional[int] = None, **kwargs):
        """Call a function of telebot's apihelper once; return Telegram's result as it came.  Raises TelegramError."""
        if (closed := self._closed_until[chat] - time.monotonic()) > 0:
            raise TooManyRequests(closed)
        try:
            return method(self._token, *args, **kwargs)
        except apihelper.ApiTelegramException as error:
            code, description = error.error_code, error.description
            seconds = finite(as_dict(error.result_json.get("parameters")).get("retry_after"))
        except apihelper.ApiHTTPException as error:        # a page of something on the way: it passes
            code, description = 500, f"{error.result.reason} (by a proxy on the way)"
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL):
            raise SettingsError("HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or TELEGRAM_API_URL can't be used: a bad address, or one "
                                "for SOCKS without PySocks") from None
        except Exception as error:             # or the answer is in no known form; the text holds the token
            raise Unreachable(type(error).__name__) from None
        if code == 401:
            raise Unauthorized(description)
        if code == 429:
            seconds = min(max(seconds or FLOOD_SECONDS, 1), FLOOD_AT_MOST)     # it need not be said [tg 6]
            self._closed_until[chat] = time.monotonic() + seconds
            raise TooManyRequests(seconds)
        if code >= 500 or "temporarily" in description:        # what getFile says of some files for a while [tg 7]
            raise Fault(description)
        raise (Conflict if code == 409 else Refused)(code, description)

    def insist(self, method: Callable, *args, chat: int, seconds: float = SAY_SECONDS, **kwargs):
        """Call until there is a definite answer, for so many seconds; what was lost on the way is sent again.  Raises
        TelegramError, Refused also where the server fails at nothing but this, and Closing when the bot is stopping."""
        limit, wait = time.monotonic() + seconds, 0.0
        for failures in itertools.count():
            self._pause(wait)
            try:
                return self.call(method, *args, chat=chat, **kwargs)
            except (TooManyRequests, Unreachable) as error:
                log.warning("%s: %s", method.__name__, error)
                wait = retry_delay(failures, error)
                if time.monotonic() + wait > limit:
                    if seconds and isinstance(error, Fault):
                        self.call(apihelper.get_me)    # raises something else where nothing goes through
                        raise Refused(500, str(error)) from error
                    raise

    def _pause(self, seconds):
        """Wait.  Raises Closing when the bot is stopping."""
        if self._closing.wait(seconds):
            raise Closing

    def _post(self, _, url, params=None, files=None, timeout=None, **__):
        """Send what telebot has prepared.  Its name is telebot's CUSTOM_REQUEST_SENDER."""
        timeout = UPLOAD_TIMEOUT if files else TIMEOUTS.get(url.rpartition("/")[2], TIMEOUT) or timeout
        body, content_type = _multipart(params, *files.popitem()) if files else (params, None)
        return self._session.post(url, data=body, headers={"Content-Type": content_type}, timeout=timeout)

    def download(self, file_id: str, chat: int) -> Iterator[bytes]:
        """Yield a file's bytes.  Raises as `insist`, and OSError."""
        path = self.insist(apihelper.get_file, file_id, chat=chat, seconds=GET_FILE_SECONDS)["file_path"]
        if self.is_local and os.path.isabs(path):       # a local Bot API server hands out its own files [tg 4]
            with open(path, "rb") as file:
                return (yield from iter(lambda: file.read(CHUNK), b""))
        try:
            with self._session.get(self._files + quote(path), stream=True, timeout=TIMEOUT) as response:
                response.raise_for_status()
                yield from response.iter_content(CHUNK)
        except requests.RequestException as error:      # its text holds the token
            raise Unreachable(type(error).__name__) from None


def plain_part(text: str) -> dict:
    """Return a part that is text as it is."""
    return {"kind": "plain", "text": whole_characters(text)}


def parts_of(text: str, kind: str = "plain", limits: tuple = (PLAIN_LIMIT,)) -> list[dict]:
    """Return the text as parts of this kind and of allowed size; none for an empty one."""
    return [{**plain_part(piece), "kind": kind} for piece in split_text(text, *limits)]


def _markup(buttons):
    """Return an inline keyboard, or None for no buttons."""
    if not buttons:
        return None
    rows = [[types.InlineKeyboardButton(one_line(label, LABEL_LIMIT) or "?",
                                        **(data if isinstance(data, dict) else {"callback_data": data}))
             for label, data in row] for row in buttons]
    return types.InlineKeyboardMarkup(rows)


def retry_delay(failures: int, error: Exception) -> float:
    """Return for how many seconds to wait after this failure, when so many came before it in a row."""
    return getattr(error, "seconds", min(2 ** failures, RETRY_AT_MOST))


class Topic:
    """A topic of a private chat: what a conversation can do there."""

    def __init__(self, telegram, user_id, thread_id):
        self._telegram, self._user_id, self._thread_id = telegram, user_id, thread_id or None
        self._insist = functools.partial(telegram.insist, chat=user_id)
        self._gone = False                     # the topic takes nothing, and that was said

    # -- drafts --------------------------------------------------------------------------------------------------------

    def frame_wait(self, last: float, now: float) -> float:
        """Return 0 when a frame may be sent now, else the seconds to wait; a turn's first (`last` is 0) waits for nobody."""
        free_at = self._telegram.next_frame[self._user_id]
        if last and now < free_at:
            return free_at - now
        self._telegram.next_frame[self._user_id] = now + (FRAME_SECONDS if self._telegram.drafts else TYPING_SECONDS)
        return 0

    def frame(self, draft_id: int, said: str, status: str) -> bool:
        """Show what was said so far, and what goes on, once: the next frame is soon due.  Return False if that was in vain."""
        text = paragraphs(tail(said, DRAFT_LIMIT - 300), tail(status, 300)) or "…"
        call = functools.partial(self._telegram.call, chat=self._user_id, message_thread_id=self._thread_id)
        try:
            if self._telegram.drafts:
                call(apihelper.send_message_draft, self._user_id, draft_id, whole_characters(text), can_stop=True,
                     keep_on_stop=True)
            else:
                call(apihelper.send_chat_action, self._user_id, "typing")
        except Refused as refusal:             # the same again would be refused too
            if NO_DRAFTS.search(str(refusal)):
                self._telegram.drafts = False
        except TelegramError:
            return False
        return self._telegram.drafts

    # -- lasting messages ----------------------------------------------------------------------------------------------

    def parts(self, text: str) -> list[dict]:
        """Cut Kiro's text into parts (see Delivery); of too many, the first and the last, and a file with all of it."""
        self._gone = False                     # Telegram may have been wrong; it is asked again
        parts = parts_of(text, "source")
        if self._telegram.rich and has_markdown(text):
            parts = parts_of(resolved(text), "rich", RICH_LIMITS)
        if len(parts) > PARTS_AT_MOST:
            caption = LEFT_OUT.format(len(parts) - 2 * PARTS_SHOWN)
            parts[PARTS_SHOWN:-PARTS_SHOWN] = [{"kind": "file", "path": "answer.md", "caption": caption, "text": text}]
        return parts

    def send(self, part: dict, buttons: Buttons, **how) -> list[dict]:
        """Send a part of an answer; return what has to go instead: of a plain one there is nothing.  Raises TelegramError."""
        kind, text, how["reply_markup"] = part["kind"], part["text"], _markup(buttons)
        try:
            if kind == "rich":
                rich = types.InputRichMessage(markdown=rich_safe(text), skip_entity_detection=True)
                self._post(apihelper.send_rich_message, rich, **how)
            else:
                shown, entities = plain_form(text) if kind == "source" else (text, None)
                self._post_plain(shown, entities=entities, is_plainest=kind == "plain", **how)
        except Refused as refusal:
            log.warning("Telegram refused a %s part: %s", kind, refusal)
            if refusal.code == 404:            # a server that lacks the method
                self._telegram.rich = False
            if len(text) > HALVED_AT_LEAST and TOO_MUCH.search(refusal.description):
                return [{**part, "text": piece} for piece in split_text(text, utf16_length(text) * 2 // 3)]
            if kind == "plain":
                raise
            return parts_of(text, "source" if kind == "rich" else "plain")
        return []

    def _post_plain(self, text, **how):
        return self._post(apihelper.send_message, text, link_preview_options=NO_PREVIEW, **how)

    def _post(self, method, content, is_plainest=False, **how):
        """Send into the topic; when that is gone, or does not even take the plainest form, to the chat itself, and say why."""
        thread_id = None if self._gone else self._thread_id
        try:
            return self._insist(method, self._user_id, content, message_thread_id=thread_id, **how)
        except Refused as refusal:
            is_of_topic = ABOUT_TOPIC.search(refusal.description) or is_plainest and refusal.code in (400, 403)
            if not (thread_id and is_of_topic):
                raise
            self._insist(apihelper.send_message, self._user_id, TOPIC_GONE.format(refusal.description), seconds=how["seconds"],
                         disable_notification=True)
        self._gone = True
        return self._post(method, content, **how)

    def say(self, text: str, buttons: Buttons = (), silent: bool = False, seconds: float = SAY_SECONDS):
        """Send a message of the bot's own, in several if it is long; return the last.  Raises TelegramError."""
        *before, last = split_text(counted(text, QUESTION_LIMIT), PLAIN_LIMIT - 200)       # room for an outcome
        for piece in before:
            self._post_plain(piece, seconds=seconds, disable_notification=True)
        return self._post_plain(last, reply_markup=_markup(buttons), seconds=seconds, disable_notification=silent,
                                is_plainest=seconds > 0)

    def ask(self, text: str, buttons: Buttons) -> int:
        """Send a question once; return its message_id.  Raises TelegramError."""
        try:
            return self.say(text, buttons, seconds=0)["message_id"]
        except Refused:                        # buttons without colours may be taken
            buttons = [[(label, {**data, "style": None}) for label, data in row] for row in buttons]
            return self.say(text, buttons, seconds=0)["message_id"]

    def show_diff(self, text: str):
        """Send a diff as code, or as a file where it is too long for that.  Raises TelegramError."""
        size = utf16_length(text)
        if size > PLAIN_LIMIT:
            self.upload(io.BytesIO(text.encode()), "changes.diff")
        else:
            self._post_plain(text, seconds=SAY_SECONDS, entities=[types.MessageEntity("pre", 0, size, language="diff")])

    def settle(self, message_id: int, text: str):
        """Replace a message with buttons by its outcome."""
        self._insist(apihelper.edit_message_text, tail(text, PLAIN_LIMIT), chat_id=self._user_id, message_id=message_id,
                     link_preview_options=NO_PREVIEW)

    def rename(self, title: str):
        """Give the topic a name."""
        self._insist(apihelper.edit_forum_topic, self._user_id, self._thread_id, title)

    def react(self, message_id: int, emoji: str):
        """Show that a message was seen."""
        self._insist(apihelper.set_message_reaction, self._user_id, message_id, [types.ReactionTypeEmoji(emoji)], seconds=0)

    def upload(self, file: IO, path: str, caption: str = "", silent: bool = False):
        """Send as photo if Telegram takes it as such, else as document.  Raises TelegramError, ValueError."""
        head, size = file.read(16), file.seek(0, os.SEEK_END)
        limit = LOCAL_UPLOAD_MB if self._telegram.is_local else UPLOAD_MB
        if size > limit << 20:
            raise ValueError(TOO_LARGE.format(limit))
        named_file = harmless_name(os.path.basename(path)), file       # safe for its headers [tg 4]
        how = {"seconds": ANSWER_SECONDS, "caption": caption, "disable_notification": silent}
        try:
            if image_type(head):
                return self._post(apihelper.send_photo, named_file, **how)
        except Refused:
            pass
        self._post(apihelper.send_data, named_file, data_type="document", **how)


def _multipart(fields, field, named_file):
    """Return the body of a request with a file, read piece by piece, and its type: requests would hold it all in memory."""
    name, file = named_file
    body, content_type = urllib3.encode_multipart_formdata({**fields, field: (name, b"")})
    head, *end = body.rpartition(b"\r\n--")      # the file is the last field
    pieces = file.seek(0, os.SEEK_END) // CHUNK + 1     # it may grow faster than it is sent
    file.seek(0)
    return itertools.chain([head], itertools.islice(iter(lambda: file.read(CHUNK), b""), pieces), end), content_type


# ======================================================================================================================
# Text: how much there is of it, and what may be shown
# ======================================================================================================================

def utf16_length(text: str) -> int:
    """Return the length in UTF-16 units, as Telegram's clients count."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def paragraphs(*texts: Optional[str]) -> str:
    """Return what there is of these texts, set apart."""
    return "\n\n".join(filter(None, texts))


def one_line(text: str, limit: int) -> str:
    """Return the text in plain sight on one line, or its beginning with an ellipsis."""
    line = in_plain_sight(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[:limit]}…"


def duration(seconds: float) -> str:
    """Return a time as people write it: 45 s, 1 m 35 s, 2 h 5 m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} m"
    return f"{minutes} m {seconds} s" if minutes else f"{seconds} s"


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


def tail(text: str, limit: int) -> str:
    """Return the end of the text, at most so many UTF-16 units, from the start of a line if possible."""
    if utf16_length(text) <= limit:
        return text
    end = text[-limit:].encode("utf-16-le", "surrogatepass")[2 - 2 * limit:].decode("utf-16-le", "ignore")
    return "…" + end[end.find("\n", 0, len(end) // 2) + 1:]


# ======================================================================================================================
# Markdown: what Kiro writes, made safe and cut to size
# ======================================================================================================================

# `_read` goes through a text once, as GitHub's Markdown has it, and says of each line what it is part of.  Everything else
# asks it: what is code, where to cut, what a message costs, what is closed at its end.  `_signs` then looks for SIGN in one
# paragraph or cell at a time.
#
# `re` holds the interpreter's lock while it searches, so each pattern must be linear on any text: no inner part can be read in
# two ways, and what is looked for in vain ends before another of its kind, at a line's end, or after 2000 characters.

# What a line begins with, matched at one place of it: a quote or an item; in a paragraph, only some are one.
LINE = r"[ ]{0,3}(?P<sign>[-*_])(?:[ \t]*(?P=sign)){2,}[ \t]*$"
QUOTE = r"[ ]{0,3}>[ \t]?"
BOX = re.compile(rf"(?!{LINE})(?:{QUOTE}|[ ]{{0,3}}(?:\d{{1,9}}[.)]|[-+*])(?:[ \t]{{1,4}}(?=\S)|[ \t]|$))")
BOX_IN_TEXT = re.compile(rf"(?!{LINE})(?:{QUOTE}|[ ]{{0,3}}(?:1[.)]|[-+*])(?:[ \t]{{1,4}}(?=\S)|[ \t](?=[ \t]+\S)))")
NOTHING = re.compile(r"(?!)")
BEGINS = {"text": BOX_IN_TEXT, "fence": NOTHING, "code": NOTHING}      # behind what; BOX behind all else

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
    | (?P<link>(?P<call>(?<=[\w)\]]))?!?\[(?P<label>{LABEL})\]\([ ]{{0,3}}(?:<(?P<angle>[^<>\n]*)>|(?P<target>(?!<)[^\s()]*
        (?:\([^\s()]*\)[^\s()]*){{0,8}}))(?:[ ]{{1,3}}(?:"[^"\n]*"|'[^'\n]*'))?[ ]{{0,3}}\))
    | (?P<newline>\\\n|(?<![ ]{{2}})\n)
    | (?P<start>(?:^[ \t>]*|(?<=[-+*.)>][ ]))(?=\#{{1,6}}[^\s\#]|\[(?!\^)[^\[\]\n]+\]:))
    | (?P<address>(?<![a-zA-Z\d])(?P<italic>(?<=_))?<?https?://(?:[^*{STOP}]|\*(?!\*)|\([^{STOP}]*\))+>?)
    | (?P<br>(?<!\s)<br[ ]*/?>|<br[ ]*/?>$)
    | (?P<empty>(?<=\|)\Z)
    | (?P<mark>`+|\$|<|==+|\|\|+|!(?=\[|<?https?://)|(?<=\])\()""", re.M | re.X)
BLOCKS = "fence", "indented", "head"     # what begins code and tables
WORDS = {"text": re.compile(".+", re.S), "heading": re.compile(".+"), "head": CELL}     # where signs belong together

DEPTH_AT_MOST = 8               # of quotes and items; a list in a list has two levels of Telegram's 16 [tg 2.1]
COLUMNS_AT_MOST = 20
ENTITIES_AT_MOST = 100
CLOSING_AT_MOST = 300           # characters at a message's end: a fence in its boxes, a remark
RANKS = {"blank": 0, "underline": -1, "rule": -1}


class Line(NamedTuple):
    """A line, and what it is part of."""
    start: int
    at: int                     # where its words start, behind the marks of quotes and items
    end: int
    kind: str                   # blank, text, underline, heading, line, fence, code, end, indented, head, rule, row
    block: int                  # where the words of its block's first line start
    rank: int                   # of a cut before it: 4 after a blank line, 3 between blocks, 2 in a box, 1 in a block, 0 in a
                                # line, -1 none
    cost: int                   # how many of Telegram's blocks begin here
    boxes: tuple[str, ...]      # open quotes and items, each as the mark that it began with


def _read(text):
    """Return the lines of a text, and what each is part of."""
    lines = [Line(0, 0, -1, "blank", 0, 0, 0, ())]       # what is before the first
    for words in text.removesuffix("\n").split("\n"):
        last = lines[-1]
        line = _read_line(text, last, last.end + 1, last.end + 1 + len(words))
        if line.kind == "rule":
            lines[-1] = last._replace(kind="head", block=last.at, rank=max(last.rank, 2), cost=last.cost + 1)
        lines.append(line)
    return lines[1:]


def _read_line(text, last, start, end):
    """Return what the line behind another one is."""
    at, boxes = start, ()
    for box in last.boxes:                     # those that go on
        goes_on = QUOTE if box == "> " else rf"[ ]{{{len(box)}}}|\t|(?=[ \t]*$)"
        match = re.compile(goes_on).match(text, at, end)
        if not match:
            break
        boxes, at = (*boxes, box), match.end()
    going, before = len(boxes), last.kind if boxes == last.boxes else ""
    match = BEGINS.get(before, BOX).match(text, at, end)
    while match and len(boxes) < DEPTH_AT_MOST:        # those that begin
        boxes, at = (*boxes, "> " if ">" in match[0] else match[0]), match.end()
        match = BOX.match(text, at, end)
    kind, begun = LEAF.match(text, at, end).lastgroup, len(boxes) - going
    if not begun:
        kind = _kind_behind(text, last, before, text[at:end], kind)
        if kind in ("code", "end", "row") or kind == last.kind in ("text", "indented"):
            return Line(start, at, end, kind, last.block, -1 if kind == "end" else 1, kind == "row", last.boxes)
    rank = RANKS.get(kind, 2 if going else 3 + (last.kind == "blank"))
    cost = begun + max(0, len(boxes) - len(last.boxes)) + (kind != "blank")      # items, their lists, words
    return Line(start, at, end, kind, last.at if kind == "rule" else at, rank, cost, boxes)


def _kind_behind(text, last, before, line, kind):
    """Return what a line is that begins no box, by itself is of this kind, and comes behind this one in the same boxes."""
    words = line.strip()
    if before in ("fence", "code"):
        is_end = re.fullmatch(rf"[ ]{{0,3}}{FENCE.match(text, last.block)[1]}+[ \t]*", line)
        return "end" if is_end else "code"
    if before == "text" and re.fullmatch("=+|-+", words):
        return "underline"
    if before == "text" and RULE.fullmatch(words) and _columns(words) == _columns(text[last.at:last.end]):
        return "rule"
    if before in ("rule", "row") and kind == "text":
        return "row"
    return "text" if last.kind == "text" and kind == "indented" else kind


def _margin(line):
    """Return how a line begins that is in the same quotes and items."""
    return re.sub("[^>]", " ", "".join(line.boxes))


def _columns(row):
    """Return how many cells a table's line has."""
    return len(CELL.findall(row.strip()))


def _signs(text):
    """Yield from where to where is no plain word, its kind, and the lines of code and tables, else the match of SIGN."""
    for _, block in itertools.groupby(_read(text), lambda line: line.block):
        lines = list(block)
        kind, start, end = lines[0].kind, lines[0].at, lines[-1].end
        if kind in BLOCKS:
            yield start, end, kind, lines
        for words in WORDS.get(kind, NOTHING).finditer(text, start, end):
            for sign in SIGN.finditer(text, *words.span()):
                yield *sign.span(), sign.lastgroup, sign


def _code_in(text, tables=False):
    """Yield where code is, and tables if wanted; what it shows, and as which entity."""
    for start, end, kind, what in _signs(text):
        if kind == "code":
            yield start, end, what[0].strip("`"), {"type": "code"}
        elif kind in BLOCKS and (tables or kind != "head"):
            inner = "\n".join(text[line.at:line.end] for line in what if line.kind not in ("fence", "end"))
            fence = FENCE.match(text, start)
            yield start, end, inner, {"type": "pre", "language": fence[2] if fence else ""}


def _without_code(text):
    """Return the text with all code blotted out."""
    return _changed(text, ((start, end, "`" * (end - start)) for start, end, *_ in _code_in(text)))


def _changed(text, changes):
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
    lines = _read(text)
    return max(len(line.boxes) for line in lines) < DEPTH_AT_MOST and (
        any(line.boxes or line.kind not in ("blank", "text") for line in lines) or bool(FORMATTED.search(text)))


def plain_form(text: str) -> tuple[str, list[dict]]:
    """Return the text with code and tables marked by entities instead of by signs; what is too much for that stays."""
    shown, entities, at = "", [], 0
    for start, end, inner, entity in _code_in(text, tables=True):
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


def visible_text(text: str, still_coming: bool = False, exists: Callable = bool) -> tuple[str, list]:
    """Return the text without its file tags, and the (path, caption) of each; a tag in code is text, and so is one in the midst
    of a sentence whose file does not exist.  An unfinished one is hidden, while the text comes also one without its caption."""
    if "<" not in text:
        return text, []
    files, changes = [], []
    uncoded = (UNFINISHED if still_coming else CUT_TAG).sub("", _without_code(text))
    for match in FILE_TAG.finditer(uncoded):
        path = match["path"].strip("\"' ")
        if not match["before"] or not match["after"] or exists(path):
            files.append((path, text[slice(*match.span("caption"))].strip()))
            changes.append((*match.span("tag"), ""))
    return _changed(text[:len(uncoded)], changes).strip("\n"), files


# -- rich messages -----------------------------------------------------------------------------------------------------

REFERENCE = re.compile(r"(?<!\\)!?\[(?P<label>[^\[\]\n]+)\](?:\[(?P<name>[^\[\]\n]*)\]|(?![(\[:]))")
DEFINITION = re.compile(r"""^[ \t>]*\[(?!\^)(?P<name>[^\[\]\n]+)\]:[ \t]*<?(?P<url>[^\s<>`]+)>?"""
                        r"""(?:[ \t]+(?:"[^"\n]*"|'[^'\n]*'))?[ \t]*$""", re.M)
SAFE_URL = re.compile(r"https?://(?:[\w.-]+\.(?:[A-Za-z][A-Za-z\d-]+|[^\W\d_A-Za-z]{2,})|\d{1,3}(?:\.\d{1,3}){3})(?::\d{1,5})?"
                      r"(?:[/?#]\S*)?|tg://\w\S*|mailto:[\w.+-]+@[\w-]+\.[\w.-]+")


def rich_safe(text: str) -> str:
    """Return Markdown, its links resolved, that Telegram neither refuses nor garbles nor fetches things for [tg 2.1-2.3]."""
    changes = []
    for start, end, kind, what in _signs(text):
        if kind not in BLOCKS:
            changes.append((start, end, _safe_sign(what)))
        elif kind == "head" and _columns(text[start:what[0].end]) > COLUMNS_AT_MOST:
            indent = _margin(what[0])
            changes.append((start, end, f"```\n{indent}{text[start:end]}\n{indent}```"))
    return _changed(text, changes)


def _safe_sign(sign):
    """Return what stands for a sign; code and escapes stay as they are."""
    kind, words = sign.lastgroup, sign[0]
    if kind == "link":
        return _safe_link(sign)
    if kind == "address":
        words = words.strip("<>")
        url = words.rstrip(".,;:!?'*~" + "_" * (sign["italic"] is not None))      # what ends the sentence
        return _linked(_escaped(url), url) + words[len(url):]
    return {"start": words + "\\", "newline": "  \n", "br": " ", "empty": " ", "mark": _escaped(words)}.get(kind, words)


def _safe_link(link):
    """Return a link that Telegram takes, or else label and target as text: a relative path would refuse it all."""
    target, words = link["angle"] or link["target"] or "", link["label"].strip("`* ")
    label = re.sub(r"!\[([^\[\]]*)\]\([^()\s]*\)", r"\1", link["label"])       # an image's words
    label = SIGN.sub(lambda sign: _escaped(sign[0]) if sign["address"] else _safe_sign(sign), label)
    if SAFE_URL.fullmatch(target):
        return _linked(label if words else _escaped(target), target)
    if link["call"] is not None:               # f[a](b)
        return f"\\[{label}]\\({target})"
    if not words or f"/{target}".partition("#")[0].endswith(f"/{words}"):
        return _linked("", target)
    return f"{label} ({_linked('', target)})" if target else label


def _linked(label, url):
    """Return a link, or what can't be one as code."""
    if SAFE_URL.fullmatch(url):
        return f"[{label}]({url.replace('$', '%24')})"
    code = url.replace("`", "")
    return f"`{code}`" if code else ""


def _escaped(words):
    """Return the words with all signs escaped."""
    return re.sub(r"([\\`*_\[\]($>=|~!])", r"\\\1", words).replace("<", "&lt;")


def resolved(text: str) -> str:
    """Return the text with the targets in its links that are defined on lines of their own."""
    words, changes = _without_code(text) if "]:" in text else "", set()
    defined = {definition["name"].lower(): definition for definition in DEFINITION.finditer(words)}
    for link in REFERENCE.finditer(words):
        definition = defined.get((link["name"] or link["label"]).lower())
        if definition:
            changes |= {(link.end("label") + 1, link.end(), f"({definition['url']})"), (*definition.span(), "")}
    return _changed(text, sorted(changes))


# -- cutting -----------------------------------------------------------------------------------------------------------

def split_text(text: str, limit: int, short: float = math.inf, cost: float = math.inf) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` UTF-16 units and of at most that `cost`, and of at most `short` where there
    are blank lines: each is cut at its last line of the best rank, and goes on in the same quotes, items, code or table."""
    room = limit - min(limit // 2, CLOSING_AT_MOST)
    left = list(_short_lines(text, max(room // 10, 1)))

    def end_of_piece(used):
        """Return before which line the piece ends that begins with the first one left, and some more."""
        cut = best = blocks = 0
        for n, line in enumerate(left):
            if n and line.rank >= best:
                cut, best = n, line.rank
            used += utf16_length(text[line.start:line.end]) + 1
            blocks += line.cost
            if cut and (used > room or blocks > cost or used > short and best == 4):
                return cut
        return len(left)

    while left:
        first = left[0]
        opening, rows = "".join(first.boxes), {"code": 1, "row": 2}.get(first.kind)
        if rows:
            head = re.compile(rf"(.*\n){{{rows}}}").match(text, first.block)[0]
            opening += (head + _margin(first)) * (utf16_length(head) <= room // 2)
        end = end_of_piece(utf16_length(opening))
        last, closing, left = left[end - 1], "", left[end:]
        words = text[first.at:last.end]
        if last.kind in ("fence", "code"):
            closing = _margin(last) + FENCE.match(text, last.block)[1]
        if words.strip():
            yield f"{opening}{words}\n{closing}".strip("\n")


def _short_lines(text, width):
    """Yield the lines of a text, those that are too long in several, cut at spaces."""
    for line in _read(text):
        while line.end - line.at > width:
            cut = text.rfind(" ", line.at + width // 2, line.at + width) + 1 or line.at + width
            yield line._replace(end=cut)
            line = line._replace(start=cut, at=cut, rank=0, cost=0)
        yield line


# ======================================================================================================================
# Running: start, stop, the console, the check
# ======================================================================================================================

HEARTBEAT_SECONDS = 0.5         # between two signs of life of the main thread
FROZEN_SECONDS = 2              # of processor time without one: something holds the interpreter's lock, and stops everybody
STOP_SIGNALS = [signal.SIGTERM, signal.SIGHUP]
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:      # nohup
    STOP_SIGNALS.remove(signal.SIGHUP)
NOBODY = "nobody yet (ALLOWED_TELEGRAM_IDS is empty): write to the bot, it tells you your id"
TOLD_BYTES = 100_000
TOLD_AT_MOST = 20               # messages that wait in one topic
CONSOLE_USER = CONSOLE_THREAD = 0
CONSOLE_HELP = "\n".join(["Just write; Kiro answers. A pasted text is one message.",
                          "Ctrl-C stops the turn; exit, quit or Ctrl-D leave.",
                          *(f"/{name:8} {what}" for name, what in COMMANDS.items())])


class StartError(Exception):
    """The bot can't run; the text is one line that says why."""


def _serve(settings):
    """Run the bot until it is told to stop; return the exit status."""
    _lock_folder()
    with SessionStore(DATABASE) as store:
        bot = Bot(settings, store)
        _announce(bot)
        os.set_blocking(bot.bell_handle, False)
        signal.set_wakeup_fd(bot.bell_handle)
        for number in signal.SIGINT, *STOP_SIGNALS:
            signal.signal(number, lambda *_: None)     # the bell rings
        threading.Thread(target=_run, args=(bot,), name="poll", daemon=True).start()
        faulthandler.register(signal.SIGPROF, chain=True)      # says where it hung, then the signal's default: the end
        while True:
            signal.setitimer(signal.ITIMER_PROF, FROZEN_SECONDS)
            if bot.rings(HEARTBEAT_SECONDS):
                break
        bot.shut_down()
    log.info("Stopped")
    return bot.exit_status


def _lock_folder():
    """Make sure that this is the folder's only bot, until the program ends.  Raises StartError."""
    descriptor = os.open(".", os.O_RDONLY)         # never closed: it holds the lock
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartError("Another bot is running in this folder") from error
    except OSError as error:                       # a network's file system, as a rule
        log.warning("This folder can't be locked (%s): see to it that no second bot runs in it", error.strerror)


def _run(bot):
    """Take up what was left, poll."""
    try:
        bot.recover()
        Poll(bot).run()
    except StoreError as error:
        bot.quit(1, str(error))
    except Exception:   # without a poll there is no bot: let whoever restarts it know
        log.exception("Polling has failed")
        bot.quit(1, "Stopping")


def _announce(bot):
    """Say in one line each what was found.  Raises SettingsError, StoreError."""
    for name, find in FINDINGS.items():
        try:
            log.info("%s: %s", name, find(bot))
        except StartError as error:            # Kiro may be installed, and Telegram be back, while the bot runs
            log.error("%s", error)
    bot.errand("menu", bot.telegram.insist, apihelper.set_my_commands,
               [types.BotCommand(*item) for item in COMMANDS.items()], chat=None)


# -- what there is: each says what it found.  Raises SettingsError, StartError, StoreError. ----------------------------

def _find_kiro(bot):
    """Return Kiro's command line."""
    command = bot.settings.kiro_command
    if not shutil.which(command[0]):
        raise StartError(f"KIRO_COMMAND: {command[0]} is not found; install Kiro CLI or name it by its path")
    return shlex.join(command)


def _find_telegram(bot):
    """Say who the bot is, and whether its private chats have topics, or how to get them."""
    if not bot.settings.token:
        raise SettingsError(f"BOT_TOKEN must be {TOKEN_FORM}")
    try:
        me = bot.telegram.call(apihelper.get_me)
    except TelegramError as error:
        if getattr(error, "code", 0) in (401, 404):
            raise SettingsError("BOT_TOKEN is not accepted by Telegram: get the current one from @BotFather") from error
        raise StartError(f"Telegram can't be reached at TELEGRAM_API_URL: {error}") from error
    topics = "on" if me.get("has_topics_enabled") else (
        "off (switch them on: @BotFather, Bot Settings, Threaded Mode); until then there is one conversation")
    return f"@{me.get('username')}, topics are {topics}"


def _describe_allowed(bot):
    """Say who may use the bot."""
    return ", ".join(map(str, sorted(bot.settings.allowed))) or NOBODY


def _make_folder(bot):
    """Make the folder for the workspaces, for its owner only, and private what holds the token or the conversations."""
    folder = bot.settings.workspaces
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
    except OSError as error:
        raise SettingsError(f"WORKSPACE_BASE_PATH: {folder} can't be used: {error.strerror}") from error
    for name in ".env", DATABASE:
        try:
            if os.stat(name).st_mode & 0o077:
                os.chmod(name, 0o600)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s is readable by others: %s", name, error.strerror)
    for path in bot.settings.allowed_folders:
        if not os.path.isdir(path):            # it may come
            log.warning("ALLOWED_FOLDERS: there is no folder %s", path)
    return folder


def _look_into_database(_):
    """Say what is in the database."""
    if not os.path.exists(DATABASE):
        return f"{DATABASE} will be made"
    with SessionStore(DATABASE) as store:
        return f"{DATABASE}, {len(store.session_ids())} sessions"


def _shake_hands(bot):
    """Start Kiro, make a session, and say what it offers.  Raises KiroFailure."""
    agent = bot.own.agent
    try:
        info = agent.ready().agent.get("agentInfo", {})
    except KiroFailure as failure:
        raise KiroFailure(agent.explain(failure)) from failure
    return (f"{info.get('name', 'the agent')} {info.get('version', '')} made a session; models: "
            f"{', '.join(agent.models.offered) or 'none reported'}")


FINDINGS = {"Kiro": _find_kiro, "Bot": _find_telegram, "Allowed": _describe_allowed, "Folder": _make_folder,
            "Database": _look_into_database}


def _check(settings):
    """Try everything once and print what was found; return 0 when all is well, else 1."""
    bot, status = Console(settings, SessionStore(":memory:")), 0
    try:
        for name, find in {**FINDINGS, "Handshake": _shake_hands}.items():
            try:
                print(f"ok    {name}: {find(bot)}")
            except (SettingsError, StartError, StoreError, KiroFailure) as error:
                status = 1
                print(f"FAIL  {name}: {error}")
    finally:
        bot.shut_down()
    return status


# -- the console -------------------------------------------------------------------------------------------------------

class Terminal(Topic):
    """A terminal in the place of a topic: what Kiro says is printed as it comes."""

    _shown = ""                                # of the answer that comes

    def frame_wait(self, last: float, now: float) -> float:
        """Return 0: a piece may be printed at any time."""
        return 0

    def frame(self, draft_id: int, said: str, status: str) -> bool:
        """Print what has come; the first one of a turn has nothing."""
        if said:
            self._print(said)
        self._shown = said
        return True

    def parts(self, text: str) -> list[dict]:
        """Return an answer in one part, however long."""
        return [plain_part(text)]

    def settle(self, message_id: int, text: str):
        """Print what became of a question."""
        print(text.splitlines()[-1])

    def _post(self, method, content, seconds, reply_markup=None, caption=None, **how):
        """Print a text, with what can be written in the place of its buttons, or the name of a file."""
        if method is not apihelper.send_message:
            content = f"[file: {content[0]}] {caption or ''}"
        buttons = itertools.chain(*reply_markup.keyboard) if reply_markup else ()
        for n, button in enumerate(buttons, 1):
            data, _, command = str(button.callback_data).partition(":/")
            if command:
                content += f"\n  {button.text:40} /{command}"
            elif data.startswith("ask:"):
                content += f"\n  {n}. {button.text}"
        self._print(f"{content}\n")
        return {"message_id": 1}

    def _print(self, text):
        """Print a text, without what of it is there already."""
        is_new = not text.startswith(self._shown)
        print("\n" + text if is_new else text[len(self._shown):], end="", flush=True)


class Console(Bot):
    """Talks to Kiro in this terminal, as user 0 in thread 0.  It may run beside a bot, since it leaves its journal, locks and
    processes alone."""

    def __init__(self, settings, store):
        super().__init__(settings, store)
        self.help = CONSOLE_HELP
        self.own = self.conversation(CONSOLE_USER, CONSOLE_THREAD)

    def chat(self, user_id: int, thread_id: int) -> Topic:
        """Return the terminal."""
        return Terminal(self.telegram, user_id, thread_id)

    def talk(self):
        """Take each line, or pasted text, as one message, or as the answer to what Kiro asks, until the input's end.  Ctrl-C
        stops the turn."""
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                question = self._question()
                text = input(f"Choose 1-{len(question.choices)}: " if question else prompt).strip()
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print()
                self.own.stop()
                continue
            if question:
                self._decide(question, text)
            elif text in ("exit", "quit"):
                return
            elif text:
                self.say_as(*self.own.key, text)

    def _question(self):
        """Wait until the turn is over, or Kiro asks something; return that, or None."""
        while self.own.turn or self._errands.keys() - {self.own}:
            time.sleep(0.01)
            for question in self.own.questions.open:
                if question.message_id and not question.decision:      # it is printed
                    return question

    def _decide(self, question, text):
        """Press the button of this number; anything else may be the answer itself."""
        numbers = [str(n) for n, (_, value) in enumerate(question.choices, 1) if not isinstance(value, Link)]
        if text in numbers:
            self.own.questions.decide(question.token, int(text) - 1)
        else:
            self.own.questions.hear(text)


def _console(settings):
    """Run the console; return the exit status."""
    if settings.log_level != "DEBUG":
        logging.disable(logging.ERROR)         # what goes wrong is said in the conversation
    if sys.stdin.isatty():
        _edit_lines()
        print("Talk to Kiro. /help tells the commands; Ctrl-C stops the turn, Ctrl-D leaves.")
    with SessionStore(DATABASE, journal="TEMP TABLE") as store:
        bot = Console(settings, store)
        _make_folder(bot)
        try:
            _find_kiro(bot)
        except StartError as error:
            print(f"{error}. A stand-in answers without it: KIRO_COMMAND='python test_sessions.py' python bot.py --console")
        try:
            bot.talk()
        finally:
            bot.shut_down()
    return 0


def _edit_lines():
    """Give `input` arrow keys and a history, and make a pasted text one line of it."""
    try:
        import readline     # not every Python has it
        readline.parse_and_bind("set enable-bracketed-paste on")
    except ImportError:
        pass


# -- the server's own messages -----------------------------------------------------------------------------------------

def _tell(settings, topic, *words):
    """Leave a message in the journal for the bot to find; return 0.  Raises SettingsError, StartError, StoreError."""
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", topic, re.ASCII)
    if not match or int(match[1]) not in settings.allowed or not os.path.exists(DATABASE):
        raise SettingsError(f"--tell {topic}: run it in the bot's folder, with USER/THREAD of an allowed user (see /status)")
    text = " ".join(words).encode(errors="replace") if words else sys.stdin.buffer.read(TOLD_BYTES + 1)
    if not text.strip() or len(text) > TOLD_BYTES:
        raise SettingsError(f"--tell: the text must have 1 to {TOLD_BYTES} bytes")
    key = int(match[1]), int(match[2])
    with SessionStore(DATABASE) as store:
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
    parser.add_argument("--check", action="store_true", help="try everything once, say what was found, exit 0 or 1")
    parser.add_argument("--console", action="store_true", help="talk to Kiro in this terminal, without Telegram")
    parser.add_argument("--tell", nargs="+", metavar=("USER/THREAD", "TEXT"),
                        help="put TEXT, or what comes on stdin, into a topic as from the server")
    options = parser.parse_args(arguments)
    umask = os.umask(0o077)
    for number in STOP_SIGNALS:                # as Ctrl-C: nothing is left behind
        signal.signal(number, lambda *_: sys.exit(130))
    try:
        settings = load_settings()._replace(umask=umask)
        set_up_logging(settings)
        if options.tell:
            return _tell(settings, *options.tell)
        _warn_of_misspelt()
        return _check(settings) if options.check else _console(settings) if options.console else _serve(settings)
    except (SettingsError, StartError, StoreError) as error:
        print(f"bot.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


def load_settings() -> Settings:
    """Read `.env` and the environment, which wins; take the token out of it, so that no child inherits it.

    Raises SettingsError.
    """
    in_file = _env_file()
    settings = read_settings({**in_file, **os.environ})
    for name in in_file.keys() - SETTINGS:     # for Kiro
        os.environ.setdefault(name, in_file[name])
    os.environ.pop("BOT_TOKEN", None)
    return settings


def _env_file():
    """Return what `.env` says, nothing when it is missing.  Raises SettingsError, also where dotenv would only warn."""
    try:
        with open(".env", encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env can't be read: {error}") from error
    for binding in bindings:
        if binding.error:
            raise SettingsError(f".env, line {binding.original.line} can't be read (is a quote missing?)")
    return {binding.key: binding.value for binding in bindings if binding.value is not None}


def _warn_of_misspelt():
    """Name what looks like a setting in `.env` and is none."""
    for name in _env_file().keys() - SETTINGS:
        for meant in difflib.get_close_matches(name, SETTINGS, 1, ALIKE):
            log.warning(".env: %s is no setting; is %s meant?", name, meant)


def start(arguments: list[str]):
    """Run the program and end it."""
    try:
        status = main(arguments)
    except KeyboardInterrupt:    # the check, or the console while it ends
        status = 130
    sys.stdout.flush()
    os._exit(status)     # not sys.exit: threads that still wait for the network must not keep the program
