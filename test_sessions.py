"""The tests of bot.py and sessions.py, and what they need to run without Telegram and without Kiro.

    pytest test_sessions.py            the tests: `python bot.py` as a process between two stand-ins
    python test_sessions.py            the stand-in Kiro: an ACP agent on stdin and stdout, whatever its arguments
    python test_sessions.py bench      measures the bot between the stand-ins
    python test_sessions.py load [N]   what one bot carries: N messages, 5,000 unless told, in 200 topics of 50 people
    python test_sessions.py kills [N]  kills the bot N times at random moments, 50 unless told, and counts what was lost

From top to bottom: the stand-in Kiro, the stand-in Telegram, the harness that runs the bot between the two,
the benchmark and the soak, the tests: of the store and the settings, a session, Kiro's faults, Telegram's faults,
the bot's faults and security, files and permissions, odd moments, the first five minutes. Both stand-ins are
strict: they refuse what the real ones refuse, and note as a *violation* what the bot should never do, so that a
mistake shows here first.

Words: a *directive* is a line of a prompt that starts with `!` and tells the stand-in Kiro what to do in this
turn; a *habit* is a way in which it misbehaves whatever the prompt says; a *gate* is a file that a turn waits
for; the *wire* is the record of all frames that any stand-in Kiro got or sent; the *control folder* (its path
is in KIRO_STAND_IN) holds habits, gates and the wire.
"""

import itertools
import json
import os
import resource
import signal
import sys
import threading
import time

# ---------------------------------------------------------------------------------------------------------
# The stand-in Kiro: the wire
#
# Up to "The stand-in Telegram" everything here also runs as a program, hundreds of times in one test run:
# only cheap imports, the others where they are needed.
# ---------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request that is answered with a JSON-RPC error."""

    def __init__(self, code, message, data=None):
        super().__init__(message)
        self.error = {"code": code, "message": message}
        if data is not None:
            self.error["data"] = data


class Violation(Refusal):
    """A refusal of what no client should ever send."""

    def __init__(self, complaint):
        super().__init__(-32602, "Invalid params", complaint)


def internal_error(data):
    """Kiro's usual error: the text for people is in `data`."""
    return Refusal(-32603, "Internal error", data)


LONGEST_NOTED = 2000  # characters of one string; a prompt may carry images of megabytes


def shortened(value):
    """`value` for the record, its long strings cut."""
    if isinstance(value, str) and len(value) > LONGEST_NOTED:
        return f"{value[:LONGEST_NOTED]}… ({len(value)} characters)"
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return value


class Wire:
    """Standard output as NDJSON, and the record of all frames in `wire.jsonl` of the control folder."""

    def __init__(self, control):
        self.writing = threading.Lock()
        self.record = None
        if control:
            path = os.path.join(control, "wire.jsonl")
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # also while the bot's disk is full
            self.record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def send(self, frame):
        frame = {"jsonrpc": "2.0", **frame}
        self.note("out", frame)
        self.write_line(json.dumps(frame, ensure_ascii=False, separators=(",", ":")).encode(errors="replace"))

    def write_line(self, line):
        rest = line + b"\n"
        try:
            with self.writing:
                while rest:
                    rest = rest[os.write(1, rest):]
        except OSError:  # nobody reads any more; the end of stdin will end the process
            pass

    def note(self, direction, frame):
        """Append one line to the record, in one write, because other processes append too."""
        if self.record is not None:
            entry = {"pid": os.getpid(), "t": time.monotonic(), "dir": direction, "frame": shortened(frame)}
            os.write(self.record, json.dumps(entry).encode() + b"\n")


class Habits:
    """`habits.json` of the control folder: read at the start and again when a prompt arrives.

    A habit is named by a step (start, initialize, new, load, list, set_model, set_config_option, prompt, cancel) and is
    then a mishap or a list of mishaps, or it is one of:

        two_processes      true: the agent is a child of the process that was started, as with `kiro-cli`
        ignore_stdin_end   true        ignore_term        true        slow_exit   seconds until the lock is freed
        unknown_session    "error" (default), "exit", "hang" or "accept" at session/load
        replay             "before" (default) or "after" the response to session/load
        image   false: not in promptCapabilities     load_session   false
        lock_pid           a number that locks name instead of the process's own      auth_methods   a list of objects
        dialect            "models" (default), "config", "grouped", "both" or "none": how models are told
        models             a list of ids           topics   {name of the folder it works in: habits that only it has there}
        lists              true: announces and serves session/list, ten sessions a page; Kiro's own is always served
        listed             what is listed instead: any value, or a number of made-up sessions
        forget_model       true: session/load reports `auto`      agent_not_found   true: says so
        permission_ids     "hyphens": allow-once           refusal   "cancelled": a refused tool ends the turn

    A mishap is an object with any of `delay` (seconds), `gate` (name), `stderr` (text), `junk` (true),
    `babble` (lines), `big_line` (kB), `kill` (true), `exit` (code), `error` (code, with `message` and `data`), `hang` (true: no
    answer; of a cancel, the only one), `talk` (true: no answer, but something else all the time), `deaf` (true:
    nothing is read from stdin after this step) and `times` (only so often, over all processes).
    """

    def __init__(self, control):
        self.control = control
        self.topic = os.path.basename(os.getcwd())
        self.switched_on, self.own = {}, {}
        self.read()

    def read(self):
        try:
            with open(os.path.join(self.control or "", "habits.json"), "rb") as file:
                self.switched_on = json.load(file) if self.control else {}
        except FileNotFoundError:
            self.switched_on = {}
        self.own = self.switched_on.get("topics", {}).get(self.topic, {})

    def get(self, name, default=None):
        return self.own.get(name, self.switched_on.get(name, default))

    def mishaps(self, step):
        """The mishaps that are due at `step` this time."""
        listed = self.get(step, [])
        listed = listed if isinstance(listed, list) else [listed]
        name = f"{self.topic}.{step}" if step in self.own else step
        return [mishap for number, mishap in enumerate(listed) if self.due(f"{name}.{number}", mishap)]

    def due(self, name, mishap):
        times = mishap.get("times")
        return times is None or any(self.claim(f"{name}.{time_}") for time_ in range(times))

    def claim(self, name):
        """True for the first process that asks."""
        try:
            os.close(os.open(os.path.join(self.control, f"claimed.{name}"), os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            return False


# ---------------------------------------------------------------------------------------------------------
# The stand-in Kiro: sessions and their files
# ---------------------------------------------------------------------------------------------------------


def new_id():
    """A random UUID (the uuid module would cost a third of the start-up)."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def sessions_folder():
    """Where sessions are kept: as Kiro does, but a mere demonstration stays away from Kiro's own folder."""
    home = os.environ.get("KIRO_HOME")
    if not home and "KIRO_STAND_IN" in os.environ:
        home = os.path.expanduser("~/.kiro")
    if not home:
        import tempfile
        home = os.path.join(tempfile.gettempdir(), f"kiro-stand-in-{os.getuid()}")
    folder = os.path.join(home, "sessions", "cli")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


class Session:
    """One conversation on disk: ID.json (its settings), ID.jsonl (its ended turns), ID.lock (who has it)."""

    def __init__(self, folder, session_id, pid):
        self.id = session_id
        self.pid = pid  # what its lock names
        self.base = os.path.join(folder, session_id)
        self.settings = {}
        self.turn = None  # the running one

    def has_turns(self):
        return all(os.path.exists(path) and os.path.getsize(path) for path in (self.base + ".json", self.base + ".jsonl"))

    def create(self, cwd):
        self.settings = {"session_id": self.id, "cwd": cwd, "created_at": now(),
                         "model": "auto", "context": 1.5, "allowed": []}
        self.save()
        open(self.base + ".jsonl", "a").close()

    def open(self):
        with open(self.base + ".json", "rb") as file:
            self.settings = json.load(file)

    def save(self):
        with open(self.base + ".new", "w") as file:
            json.dump(self.settings, file)
        os.replace(self.base + ".new", self.base + ".json")

    def history(self):
        """The updates of all ended turns, as they are replayed."""
        with open(self.base + ".jsonl", "rb") as file:
            return [json.loads(line) for line in file]

    def entry(self):
        """What a list says of it; Kiro's titles are the first message."""
        title = next(update["content"]["text"] for update in self.history() if update["sessionUpdate"] == "user_message_chunk")
        when = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(os.path.getmtime(self.base + ".jsonl")))
        return {"sessionId": self.id, "title": title, "updatedAt": when}

    def remember(self, updates):
        with open(self.base + ".jsonl", "a") as file:
            file.writelines(json.dumps(update) + "\n" for update in updates)

    def lock(self):
        """Take the session for this process; a lock outlives its process unless that ended cleanly."""
        try:
            lock = os.open(self.base + ".lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            holder = self.lock_holder()
            if holder != self.pid:
                raise internal_error("Failed to start session: "
                                     f"Session is active in another process (PID {holder})") from None
            return
        os.write(lock, json.dumps({"pid": self.pid, "started_at": now()}).encode())
        os.close(lock)

    def lock_holder(self):
        try:
            with open(self.base + ".lock", "rb") as file:
                return json.load(file)["pid"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def unlock(self):
        try:
            os.unlink(self.base + ".lock")
        except FileNotFoundError:
            pass


# ---------------------------------------------------------------------------------------------------------
# The stand-in Kiro: the agent
# ---------------------------------------------------------------------------------------------------------

MODELS = ["auto", "claude-sonnet-4.5", "claude-sonnet-4", "claude-haiku-4.5", "qwen3-coder-next"]
MODES = ["kiro_default", "kiro_planner"]


def field(params, name, kind):
    """The parameter `name`, which must be there and of that type."""
    if not isinstance(params, dict):
        raise Violation("params: not an object")
    if type(params.get(name)) is not kind:
        raise Violation(f"{name}: missing or not of type {kind.__name__}")
    return params[name]


def text_block(text):
    return {"type": "text", "text": text}


def hand_over():
    """Go on as a child, as `kiro-cli` does; this process only waits for it, and passes no signal on."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


class Reply:
    """The client's answer to a request of ours, once it is there."""

    def __init__(self):
        self.arrived = threading.Event()
        self.frame = None


class StandInKiro:
    """The stand-in as a process: reads frames on the main thread, each request is answered on its own."""

    def __init__(self):
        self.control = os.environ.get("KIRO_STAND_IN")
        self.habits = Habits(self.control)
        if self.habits.get("two_processes"):
            hand_over()
        self.wire = Wire(self.control)
        self.folder = sessions_folder()
        self.sessions = {}  # session id -> Session, those that this process holds
        self.replies = {}  # id of a request of ours -> Reply
        self.finishing = threading.Lock()  # held while the end of a turn is told; the end of stdin waits for it
        self.initialized = False
        self.client = {}  # the capabilities of the client

    # -- life

    def run(self):
        signal.signal(signal.SIGTERM, self.terminate)
        self.wire.note("start", {"argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ)})
        mishaps = self.habits.mishaps("start")
        if self.suffer(mishaps):
            self.stay()
        for line in sys.stdin.buffer:
            if self.receive(line):
                self.stay()
        if self.habits.get("ignore_stdin_end"):
            self.stay()
        time.sleep(self.habits.get("slow_exit", 0))
        with self.finishing:
            self.leave(0)

    def stay(self):
        """Neither read nor end; only signals are heard."""
        while True:
            signal.pause()

    def terminate(self, *_):
        if not self.habits.get("ignore_term"):
            self.leave(0)

    def leave(self, code, clean=True):
        """End the process; only a clean end removes the locks."""
        for session in self.sessions.values() if clean else ():
            session.unlock()
        self.wire.note("exit", {"code": code})
        os._exit(code)

    def suffer(self, mishaps, pause=time.sleep):
        """Live through the mishaps of one step; True when the step is to have no answer."""
        for mishap in mishaps:
            pause(mishap.get("delay", 0))
            if "gate" in mishap:
                self.wait_for_gate(mishap["gate"], pause)
            if "stderr" in mishap:
                os.write(2, mishap["stderr"].encode() + b"\n")
            if "junk" in mishap:
                self.send_junk()
            if "babble" in mishap:
                self.wire.write_line(b"\n".join([b"A line of a log. " * 6] * mishap["babble"]))
            if "big_line" in mishap:
                padding = "x" * (mishap["big_line"] * 1024)
                self.notify("_kiro.dev/commands/available", commands=[{"name": "/x", "description": padding}])
            if "kill" in mishap:
                os.kill(os.getpid(), signal.SIGKILL)
            if "exit" in mishap:
                self.leave(mishap["exit"], clean=False)
            if "error" in mishap:
                raise Refusal(mishap["error"], mishap.get("message", "Internal error"), mishap.get("data"))
            while "talk" in mishap:
                self.notify("_kiro.dev/subagent/list_update", subagents=[], pendingStages=[])
                pause(0.02)
        return any("hang" in mishap for mishap in mishaps)

    def wait_for_gate(self, name, pause=time.sleep):
        while not os.path.exists(os.path.join(self.control or "", name)):
            pause(0.005)

    # -- frames in

    def receive(self, line):
        """Take one line of stdin; True when no other is to be read."""
        try:
            frame = json.loads(line)
        except ValueError:
            self.wire.note("violation", "a line that is no JSON: " + repr(line[:200]))
            return self.wire.send({"error": {"code": -32700, "message": "Parse error"}})
        self.wire.note("in", frame)
        if not isinstance(frame, dict) or frame.get("jsonrpc") != "2.0":
            return self.wire.note("violation", "a frame that is no JSON-RPC 2.0 object")
        if "method" not in frame:
            return self.take_reply(frame)
        if "id" not in frame:
            return self.take_notification(frame)
        return self.take_request(frame)

    def take_reply(self, frame):
        reply = self.replies.pop(frame.get("id"), None)
        if reply is None:
            return self.wire.note("violation", f"a response to a request that was not made: {frame.get('id')}")
        if ("result" in frame) == ("error" in frame):
            self.wire.note("violation", "a response with both or none of result and error")
        reply.frame = frame
        reply.arrived.set()

    def take_notification(self, frame):
        params = frame.get("params") or {}
        session = self.sessions.get(params.get("sessionId"))
        if frame["method"] != "session/cancel" or session is None:
            return self.wire.note("violation", f"{frame['method']}: unknown notification or session")
        if session.turn and not any("hang" in mishap for mishap in self.habits.mishaps("cancel")):
            session.turn.cancel()

    def take_request(self, frame):
        """Start the answer; a prompt's turn is known at once, so that a cancel right behind it finds it."""
        step = frame["method"].rpartition("/")[2]
        if step in ("prompt", "list"):
            self.habits.read()
        mishaps = self.habits.mishaps(step)
        work = self.answer
        try:
            if frame["method"] == "session/prompt":
                work = self.begin_turn(frame)
        except Refusal as refusal:
            return self.refuse(frame["id"], refusal)
        threading.Thread(target=work, args=(frame, mishaps), daemon=True).start()
        return any("deaf" in mishap for mishap in mishaps)

    def begin_turn(self, frame):
        params = frame.get("params")
        session = self.session(params)
        check_prompt(field(params, "prompt", list), self.habits.get("image", True))
        if session.turn:
            raise Violation("Prompt already in progress")
        session.turn = PlayedTurn(self, session, frame["id"], params["prompt"])
        return session.turn.run

    # -- frames out

    def answer(self, frame, mishaps):
        """Answer any request but a prompt."""
        respond = self.METHODS.get(frame["method"])
        try:
            if respond is None:
                raise Refusal(-32601, "Method not found", frame["method"])
            if not self.initialized and respond is not StandInKiro.initialize:
                raise Violation(f"{frame['method']} before initialize was answered")
            if not self.suffer(mishaps):
                respond(self, frame["id"], frame.get("params"))
        except Refusal as refusal:
            self.refuse(frame["id"], refusal)

    def refuse(self, request_id, refusal):
        if isinstance(refusal, Violation):
            self.wire.note("violation", refusal.error["data"])
        self.wire.send({"error": refusal.error, "id": request_id})

    def respond(self, request_id, result):
        self.wire.send({"result": result, "id": request_id})

    def notify(self, method, **params):
        self.wire.send({"method": method, "params": params})

    def update(self, session_id, update):
        self.notify("session/update", sessionId=session_id, update=update)

    def ask(self, method, params):
        """Send the client a request; the Reply to come."""
        request_id = new_id()
        reply = self.replies[request_id] = Reply()
        self.wire.send({"method": method, "params": params, "id": request_id})
        return reply

    def send_junk(self):
        for line in JUNK:
            self.wire.write_line(line)

    # -- the methods

    def initialize(self, request_id, params):
        field(params, "protocolVersion", int)
        self.client = params.get("clientCapabilities") or {}
        prompts = {"image": self.habits.get("image", True), "audio": False, "embeddedContext": False}
        self.initialized = True
        self.respond(request_id, {
            "protocolVersion": 1,
            "agentCapabilities": {
                "loadSession": self.habits.get("load_session", True),
                "promptCapabilities": prompts,
                "mcpCapabilities": {"http": True, "sse": False},
                "sessionCapabilities": {"list": {}} if self.habits.get("lists") else {},
                "auth": {},
            },
            "authMethods": self.habits.get("auth_methods", []),
            "agentInfo": {"name": "Kiro CLI Agent", "title": "Stand-in for the Kiro CLI Agent", "version": "2.19.0"},
        })

    def session_new(self, request_id, params):
        cwd = self.checked_cwd(params)
        session = Session(self.folder, new_id(), self.habits.get("lock_pid", os.getpid()))
        self.hold(session)
        session.create(cwd)
        self.notify("_kiro.dev/subagent/list_update", subagents=[], pendingStages=[])
        self.respond(request_id, {"sessionId": session.id, **self.described(session)})
        self.announce(session)

    def session_load(self, request_id, params):
        if not self.habits.get("load_session", True):
            raise Refusal(-32601, "Method not found", "session/load")
        session = Session(self.folder, field(params, "sessionId", str), self.habits.get("lock_pid", os.getpid()))
        cwd = self.checked_cwd(params)
        if not session.has_turns() and not self.make_up(session, cwd):
            return
        self.hold(session)
        session.open()
        if self.habits.get("forget_model") or session.settings["model"] not in self.models():
            session.settings["model"] = "auto"
        self.notify("_kiro.dev/subagent/list_update", subagents=[], pendingStages=[])
        late = self.habits.get("replay") == "after"
        if not late:
            self.replay(session)
        self.respond(request_id, self.described(session))
        if late:
            self.replay(session)
        self.announce(session)

    def make_up(self, session, cwd):
        """A session that is to be loaded but isn't there, or empty: True when the load goes on all the same."""
        way = self.habits.get("unknown_session", "error")
        if way == "error":
            raise internal_error(f"Failed to load session: no session with id {session.id}")
        if way == "exit":
            self.leave(0)
        if way == "accept":
            session.create(cwd)
        return way == "accept"

    def session_set_model(self, request_id, params):
        session = self.session(params)
        if self.habits.get("dialect", "models") not in ("models", "both"):
            raise Refusal(-32601, "Method not found", "session/set_model")
        self.choose_model(session, field(params, "modelId", str))
        self.respond(request_id, {})

    def session_set_config_option(self, request_id, params):
        if self.habits.get("dialect", "models") not in ("config", "grouped", "both"):
            raise Refusal(-32601, "Method not found", "session/set_config_option")
        session = self.session(params)
        if field(params, "configId", str) != "llm":
            raise internal_error(f"Unknown config option {params['configId']}")
        self.choose_model(session, field(params, "value", str))
        self.respond(request_id, {"configOptions": self.config_options(session)})

    def kiro_session_list(self, request_id, params):
        sessions = self.listed(params)
        self.respond(request_id, {"sessions": sessions} if type(sessions) is list else sessions)

    def session_list(self, request_id, params):
        if not self.habits.get("lists"):
            raise Violation("session/list was not announced")
        sessions, start = self.listed(params), int(params.get("cursor", "0"))
        page = [{**session, "cwd": params["cwd"]} for session in sessions[start:start + 10]]
        more = {"nextCursor": str(start + 10)} if start + 10 < len(sessions) else {}
        self.respond(request_id, {"sessions": page, **more})

    def listed(self, params):
        """The folder's sessions, the oldest first, or what the habit `listed` says."""
        cwd, listed = field(params, "cwd", str), self.habits.get("listed")
        if type(listed) is int:
            return [{"sessionId": f"made-up-{number}", "title": f"Number {number}",
                     "updatedAt": f"2026-01-01T00:{number // 200:02}:{number % 200 // 4:02}.{number % 4}Z"}
                    for number in range(listed)]
        return listed if listed is not None else [session.entry() for session in self.kept_sessions(cwd)]

    def kept_sessions(self, cwd):
        for name in os.listdir(self.folder):
            session = Session(self.folder, name.removesuffix(".json"), 0)
            if name.endswith(".json") and session.has_turns():
                session.open()
                if session.settings["cwd"] == cwd:
                    yield session

    METHODS = {
        "initialize": initialize,
        "_kiro.dev/session/list": kiro_session_list,
        "session/list": session_list,
        "session/new": session_new,
        "session/load": session_load,
        "session/set_model": session_set_model,
        "session/set_config_option": session_set_config_option,
    }

    # -- what they share

    def session(self, params):
        session_id = field(params, "sessionId", str)
        if session_id not in self.sessions:
            raise Violation(f"session {session_id} is not open in this process")
        return self.sessions[session_id]

    def checked_cwd(self, params):
        cwd = field(params, "cwd", str)
        if not os.path.isabs(cwd) or not os.path.isdir(cwd):
            raise Violation(f"cwd: not an absolute path of an existing folder: {cwd}")
        field(params, "mcpServers", list)
        return cwd

    def hold(self, session):
        session.lock()
        self.sessions[session.id] = session

    def replay(self, session):
        for update in session.history():
            self.update(session.id, update)

    def announce(self, session):
        """What Kiro tells after session/new and session/load."""
        self.notify("_kiro.dev/commands/available", sessionId=session.id,
                    commands=[{"name": "/compact", "description": "Summarize the conversation"}])
        if self.habits.get("agent_not_found"):
            self.notify("_kiro.dev/agent/not_found", sessionId=session.id,
                        requestedAgent="missing", fallbackAgent="kiro_default")
        self.metadata(session)

    def metadata(self, session, **more):
        self.notify("_kiro.dev/metadata", sessionId=session.id,
                    contextUsagePercentage=session.settings["context"], **more)

    def models(self):
        return self.habits.get("models", MODELS)

    def choose_model(self, session, model):
        if model not in self.models():
            raise internal_error(f"The model '{model}' is not available")
        session.settings["model"] = model
        session.save()

    def described(self, session):
        """The modes and models that a session has, in the dialect that is spoken."""
        dialect = self.habits.get("dialect", "models")
        modes = [{"id": mode, "name": mode, "description": f"The agent {mode}"} for mode in MODES]
        told = {"modes": {"currentModeId": MODES[0], "availableModes": modes}}
        if dialect in ("models", "both"):
            models = [{"modelId": model, "name": model, "description": f"About {model}"} for model in self.models()]
            told["models"] = {"currentModelId": session.settings["model"], "availableModels": models}
        if dialect in ("config", "grouped", "both"):
            told["configOptions"] = self.config_options(session)
        return told

    def config_options(self, session):
        """The model under an id of its own among other options: only its category tells what it is."""
        models = [{"value": model, "name": model.title()} for model in self.models()]
        if self.habits.get("dialect") == "grouped":
            models = [{"group": "first", "name": "First", "options": models[:2]},
                      {"group": "more", "name": "More", "options": models[2:]}]
        modes = [{"value": mode, "name": mode} for mode in MODES]
        return [
            {"id": "model", "name": "Agent", "category": "mode", "type": "select",
             "currentValue": MODES[0], "options": modes},
            {"id": "autopilot", "name": "Autopilot", "type": "boolean", "currentValue": False},
            {"id": "llm", "name": "Model", "category": "model", "type": "select",
             "currentValue": session.settings["model"], "options": models},
        ]


def check_prompt(blocks, images_taken):
    """Refuse a prompt whose blocks Kiro could not read."""
    if not blocks:
        raise Violation("prompt: empty")
    for block in blocks:
        kind = field(block, "type", str)
        if kind == "text":
            field(block, "text", str)
        elif kind == "resource_link":
            field(block, "uri", str), field(block, "name", str)
        elif kind == "image" and images_taken:
            check_image(block)
        else:
            raise Violation(f"prompt: a block of type {kind} is not taken")
    if len([block for block in blocks if block["type"] == "image"]) > 10:
        raise Violation("prompt: more than 10 images")


def check_image(block):
    import base64
    if field(block, "mimeType", str) not in ("image/png", "image/jpeg", "image/gif", "image/webp"):
        raise Violation(f"prompt: an image of type {block['mimeType']}")
    try:
        base64.b64decode(field(block, "data", str), validate=True)
    except ValueError:
        raise Violation("prompt: an image that is not base64") from None


# ---------------------------------------------------------------------------------------------------------
# The stand-in Kiro: turns
# ---------------------------------------------------------------------------------------------------------

JUNK = [
    b"Loading tools...", b"", b"   ", b"{", b"[1, 2]", b"17", b"null", b'"text"', b"\xff\xfe", b"{}",
    b'{"jsonrpc":"2.0"}',
    b'{"jsonrpc":"2.0","result":{},"id":987654}',
    b'{"jsonrpc":"2.0","result":{},"id":"no-such-request"}',
    b'{"jsonrpc":"2.0","error":{"code":-32603,"message":"no id"}}',
    b'{"jsonrpc":"2.0","method":"session/update"}',
    b'{"jsonrpc":"2.0","method":"session/update","params":null}',
    b'{"jsonrpc":"2.0","method":"session/update","params":[]}',
    b'{"jsonrpc":"2.0","method":"session/update","params":{"sessionId":7,"update":null}}',
    b'{"jsonrpc":"2.0","method":"_kiro.dev/metadata","params":null}',
    b'{"jsonrpc":"2.0","method":"_kiro.dev/no/such/notification","params":{"x":1}}',
    b'{"jsonrpc":"2.0","method":17,"params":{}}',
    b'{"jsonrpc":"2.0","method":["session/update"],"params":{},"id":[1]}',
    b'{"jsonrpc":"2.0","result":{"agentCapabilities":{}},"id":true}',
    b'{"jsonrpc":"2.0","result":[],"id":[1]}',
    b'{"jsonrpc":"2.0","result":{},"id":{"a":1}}',
    b'{"jsonrpc":"2.0","method":"session/update","params":{"update":{"sessionUpdate":["agent_message_chunk"]}}}',
    b'{"jsonrpc":"2.0","method":"session/update","params":{"update":{"sessionUpdate":{"a":1}}}}',
    b'{"jsonrpc":"2.0","method":"session/update","params":{"update":["agent_message_chunk"]}}',
]

DEMO = """\
You wrote: **{text}**

I am the stand-in agent of the tests, so that is all I can say about it. Write `help` to see what I can play.
"""

HELP = """\
I am the stand-in agent of the tests. Write one of these words:

{plays}

`help all` tells the rest.
"""

HELP_ALL = """\
Lines that start with `!` tell me what to do:

{directives}
"""

PLAYS = {  # a word that a visitor writes: what it shows, and how
    "ask": ("I ask for permission to do something", "!ask Running: npm test\n!say That was your decision."),
    "table": ("an answer with a table and code",
              r"!say Three animals:\n\n| animal | legs |\n|---|---|\n| dog | 4 |\n| hen | 2 |\n\n```python\nprint(4 + 2)\n```"),
    "file": ("I make a file and send it to you",
             '!file animals.txt dog 4, hen 2\n!say Here it is. <send_file path="animals.txt">Animals</send_file>'),
    "slow": ("half a minute of numbers, which you can stop", "!chunks 120 4 0.25"),
}


def numbered_chunk(number, size):
    """The text of one chunk of `!chunks`: its number in `size` characters, eight to a line."""
    return f"{number:0{size - 1}d}" + ("\n" if number % 8 == 7 else " ")


def directives(text):
    """The (name, rest) of each line of `text` that starts with `!`."""
    lines = [line[1:] for line in text.splitlines() if line.startswith("!") and len(line) > 1]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def coalesced(updates):
    """The updates as Kiro keeps them: neighbouring chunks are one."""
    for kind, group in itertools.groupby(updates, key=lambda update: update["sessionUpdate"]):
        if kind == "agent_message_chunk":
            yield {"sessionUpdate": kind, "content": text_block("".join(one["content"]["text"] for one in group))}
        else:
            yield from group


class TurnOver(Exception):
    """The turn ends here, with this stop reason; None: without any response."""

    def __init__(self, stop_reason):
        super().__init__(stop_reason)
        self.stop_reason = stop_reason


class PlayedTurn:
    """One prompt and its answer: carries out the directives in the prompt's text."""

    def __init__(self, agent, session, request_id, prompt):
        self.agent = agent
        self.session = session
        self.request_id = request_id
        self.prompt = prompt
        self.cancelled = threading.Event()
        self.reply = None  # the Reply that is waited for
        self.tool = None  # the tool call that runs
        self.updates = []  # for the history
        self.afterwards = []  # what is still to be sent when the turn is over
        self.credits = [0.02, 0.01]

    # -- how a turn runs

    def run(self, _frame, mishaps):
        try:
            if self.agent.suffer(mishaps, self.pause):
                raise TurnOver(None)
            self.perform()
            self.end("end_turn")
        except TurnOver as over:
            self.end(over.stop_reason)
        except Refusal as refusal:
            self.session.turn = None
            self.agent.refuse(self.request_id, refusal)

    def perform(self):
        script = [step for block in self.prompt for step in directives(block.get("text", ""))]
        if not self.agent.control:
            _, play = PLAYS.get(self.text().strip().lower(), ("", ""))
            script += directives(play)
        for name, rest in script:
            directive = getattr(self, "do_" + name, None)
            if directive is None:
                raise Refusal(-32602, "Invalid params", f"unknown directive !{name}")
            try:
                directive(rest)
            except (OSError, ValueError, TypeError, IndexError) as error:
                raise Violation(f"!{name} {rest}: {error!r}") from error
        if not script:
            self.reply_to(self.text())

    def text(self):
        """The user's own text: without the block that explains <send_file> to the agent."""
        texts = [block["text"] for block in self.prompt if block["type"] == "text"]
        images = [f"[{block['mimeType']}]" for block in self.prompt if block["type"] == "image"]
        return "\n".join([text for text in texts if "<send_file" not in text] + images)

    def reply_to(self, text):
        if text.startswith("/compact"):
            self.do_compaction("")
        elif text.startswith("/clear"):
            self.notify("clear/status", status={"type": "completed"})
        elif self.agent.control:
            self.stream(f"echo: {text}", 12, 0)
        elif text.strip().lower() == "help all":
            self.stream(HELP_ALL.format(directives=self.usage()), 40, 0.02)
        elif "help" in text.lower():
            plays = "\n".join(f"- `{word}`: {what}" for word, (what, _) in PLAYS.items())
            self.stream(HELP.format(plays=plays), 40, 0.02)
        else:
            self.stream(DEMO.format(text=text), 8, 0.02)

    def usage(self):
        documents = [method.__doc__ for name, method in vars(PlayedTurn).items() if name.startswith("do_")]
        return "\n".join(f"- {' '.join(document.split())}" for document in documents)

    def end(self, stop_reason):
        if stop_reason is None:
            self.session.turn = None
            return
        if self.tool and not self.cancelled.is_set():
            self.do_tool_done("")
        if not self.cancelled.is_set():
            self.remember()
        metering = [{"value": value, "unit": "credit", "unitPlural": "credits"} for value in self.credits]
        self.agent.metadata(self.session)
        self.agent.metadata(self.session, meteringUsage=metering, turnDurationMs=17)
        self.session.turn = None
        with self.agent.finishing:
            self.agent.respond(self.request_id, {"stopReason": stop_reason})
            for send in self.afterwards:
                send()

    def remember(self):
        asked = [{"sessionUpdate": "user_message_chunk", "content": block} for block in self.prompt]
        self.session.remember(asked + list(coalesced(self.updates)))

    def cancel(self):
        self.cancelled.set()
        if self.reply:
            self.reply.arrived.set()

    def pause(self, seconds):
        """Wait, but not beyond a cancel."""
        if self.cancelled.wait(seconds) if seconds else self.cancelled.is_set():
            raise TurnOver("cancelled")

    def wait_for_reply(self, method, params):
        """The client's response to a request of ours."""
        self.reply = self.agent.ask(method, params)
        self.reply.arrived.wait()
        self.pause(0)
        return self.reply.frame

    def update(self, update):
        self.pause(0)
        self.updates.append(update)
        self.agent.update(self.session.id, update)

    def say(self, text):
        self.update({"sessionUpdate": "agent_message_chunk", "content": text_block(text)})

    def stream(self, text, size, seconds):
        for start in range(0, len(text), size):
            self.say(text[start:start + size])
            self.pause(seconds)

    def notify(self, method, **params):
        self.agent.notify("_kiro.dev/" + method, sessionId=self.session.id, **params)

    # -- directives: speaking

    def do_say(self, text):
        """`!say TEXT`: one chunk of text; \\n is a line break."""
        self.say(text.replace("\\n", "\n"))

    def do_block(self, content):
        """`!block JSON`: one chunk with this content: an image, a link, a resource."""
        self.agent.update(self.session.id, {"sessionUpdate": "agent_message_chunk", "content": json.loads(content)})

    def do_chunks(self, numbers):
        """`!chunks N SIZE [SECONDS]`: N numbered chunks of SIZE characters, with a pause after each."""
        count, size, *seconds = numbers.split()
        for number in range(int(count)):
            self.say(numbered_chunk(number, int(size)))
            self.pause(float(seconds[0]) if seconds else 0)

    def do_recite(self, name_and_size):
        """`!recite NAME [SIZE]`: the file NAME of the control folder, in chunks of SIZE characters."""
        name, *size = name_and_size.split()
        with open(os.path.join(self.agent.control or "", name), encoding="utf-8", newline="") as file:
            self.stream(file.read(), int(size[0]) if size else 20, 0)

    def do_recall(self, _):
        """`!recall`: what was asked in this session's earlier turns."""
        asked = [update["content"].get("text", "an image") for update in self.session.history()
                 if update["sessionUpdate"] == "user_message_chunk"]
        self.say(f"{len(asked)} before: " + " | ".join(asked).replace("<", "‹"))

    def do_model(self, _):
        """`!model`: which model this session has."""
        self.say(f"model: {self.session.settings['model']}")

    def do_thought(self, text):
        """`!thought TEXT`: a thought, which is no part of the answer."""
        self.agent.update(self.session.id,
                          {"sessionUpdate": "agent_thought_chunk", "content": text_block(text)})

    def do_surrogates(self, _):
        """`!surrogates`: an emoji whose halves come in two chunks."""
        for half in ("\ud83d", "\ude00"):
            update = {"sessionUpdate": "agent_message_chunk", "content": text_block(half)}
            params = {"sessionId": self.session.id, "update": update}
            self.do_raw(json.dumps({"jsonrpc": "2.0", "method": "session/update", "params": params}))

    def do_late(self, text):
        """`!late TEXT`: a chunk that comes after the turn's end."""
        update = {"sessionUpdate": "agent_message_chunk", "content": text_block(text)}
        self.afterwards.append(lambda: self.agent.update(self.session.id, update))

    def do_update_other_session(self, text):
        """`!update_other_session TEXT`: a chunk for a session that is not this one."""
        self.agent.update(new_id(), {"sessionUpdate": "agent_message_chunk", "content": text_block(text)})

    # -- directives: waiting

    def do_wait(self, name):
        """`!wait NAME`: go on when the file NAME is in the control folder."""
        self.agent.wait_for_gate(name, self.pause)

    def do_sleep(self, seconds):
        """`!sleep SECONDS`: pause."""
        self.pause(float(seconds))

    def do_silence(self, _):
        """`!silence`: nothing more, until cancelled."""
        self.cancelled.wait()
        self.pause(0)

    # -- directives: tools and permissions

    def do_tool(self, kind_and_title):
        """`!tool KIND TITLE`: a tool call (execute, edit, read, ...) that runs until `!tool_done` or the end."""
        kind, _, title = kind_and_title.partition(" ")
        subject = {"command": title.partition(": ")[2] or title} if kind == "execute" else {"path": title.split()[-1]}
        self.tool = {"sessionUpdate": "tool_call", "toolCallId": "tooluse_" + new_id(), "title": title, "kind": kind,
                     "rawInput": subject, "_meta": {"kiro": {"toolName": "shell" if kind == "execute" else kind}}}
        self.update(self.tool)

    def do_tool_done(self, status):
        """`!tool_done [failed]`: the running tool ends."""
        if self.tool:
            output = {"items": [{"Json": {"exit_status": "exit status: 0", "stdout": "", "stderr": ""}}]}
            self.update({"sessionUpdate": "tool_call_update", "toolCallId": self.tool["toolCallId"],
                         "status": status or "completed", "rawOutput": output})
        self.tool = None

    def do_plan(self, entries):
        """`!plan [x] DONE, [>] NOW, [ ] TO DO`: a plan, as ACP has it."""
        statuses = {"x": "completed", ">": "in_progress", " ": "pending"}
        self.update({"sessionUpdate": "plan", "entries": [
            {"content": entry[4:], "priority": "medium", "status": statuses[entry[1]]} for entry in entries.split(", ")]})

    def do_ask(self, title):
        """`!ask [TITLE]`: ask permission for the running tool, or for the command TITLE; say the outcome."""
        if title or not self.tool:
            self.do_tool("execute " + (title or "Running: make"))
        title = self.tool["title"]
        if title in self.session.settings["allowed"]:
            return self.say("permission: allowed before\n")
        options = self.options()
        call = {"toolCallId": self.tool["toolCallId"], "title": title}
        answer = self.wait_for_reply("session/request_permission", {
            "sessionId": self.session.id, "toolCall": call, "options": options, "_meta": {"trustOptions": []}})
        self.act_on(self.chosen(answer, options))

    def do_ask_many(self, count):
        """`!ask_many N`: ask N permissions at once, and wait for none of them."""
        for number in range(int(count)):
            self.agent.ask("session/request_permission", {"sessionId": self.session.id, "options": self.options(),
                                                          "toolCall": {"toolCallId": new_id(), "title": f"do {number}."}})

    def options(self):
        kinds = [("allow_once", "Yes"), ("allow_always", "Always"), ("reject_once", "No")]
        hyphens = self.agent.habits.get("permission_ids") == "hyphens"
        return [{"optionId": kind.replace("_", "-") if hyphens else kind, "name": name, "kind": kind}
                for kind, name in kinds]

    def chosen(self, answer, options):
        """The kind of the option that the client selected."""
        outcome = (answer.get("result") or {}).get("outcome") or {}
        kinds = {option["optionId"]: option["kind"] for option in options}
        if outcome == {"outcome": "cancelled"}:
            return "cancelled"
        if outcome.get("outcome") == "selected" and outcome.get("optionId") in kinds:
            return kinds[outcome["optionId"]]
        raise Violation(f"session/request_permission was answered with {answer}")

    def act_on(self, kind):
        self.say(f"permission: {kind}\n")
        if kind == "allow_always":
            self.session.settings["allowed"].append(self.tool["title"])
            self.session.save()
        if not kind.startswith("allow"):
            self.do_tool_done("failed")
            if self.agent.habits.get("refusal") == "cancelled":
                raise TurnOver("cancelled")

    def do_elicit(self, params):
        """`!elicit JSON`: ask what the JSON says (mode, message, requestedSchema, url); say the answer."""
        params = {"mode": "form", "message": "How?", **json.loads(params)}
        announced = self.agent.client.get("elicitation", {})
        if params["mode"] in ("form", "url") and not isinstance(announced.get(params["mode"]), dict):
            raise Violation(f"elicitation of mode {params['mode']} was not announced")
        answer = self.wait_for_reply("elicitation/create", {"sessionId": self.session.id, **params})
        result = answer.get("result")
        if not isinstance(result, dict) or result.get("action") not in ("accept", "decline", "cancel"):
            raise Violation(f"elicitation/create was answered with {answer}")
        if ("content" in result) != (result["action"] == "accept" and params["mode"] == "form"):
            raise Violation(f"elicitation/create was answered with {answer}")
        self.say(f"elicited: {result['action']} {json.dumps(result.get('content'), ensure_ascii=False)}\n")

    def do_late_ask(self, _):
        """`!late_ask`: ask a permission, and what a form asks, after the turn's end."""
        call = {"toolCallId": "tooluse_late", "title": "Running: late"}
        params = {"sessionId": self.session.id, "toolCall": call, "options": self.options()}
        self.afterwards.append(lambda: self.agent.ask("session/request_permission", params))
        params = {"sessionId": self.session.id, "mode": "form", "message": "late?", "requestedSchema": {}}
        self.afterwards.append(lambda: self.agent.ask("elicitation/create", params))

    def do_request(self, method):
        """`!request METHOD`: make a request that the client doesn't know, and say with which code it was refused."""
        answer = self.wait_for_reply(method, {"sessionId": self.session.id})
        self.say(f"{method}: {answer.get('error', {}).get('code', 'accepted')}\n")

    def do_file(self, name_and_content):
        """`!file NAME CONTENT`: write a file in the workspace."""
        name, _, content = name_and_content.partition(" ")
        with open(os.path.join(self.session.settings["cwd"], name), "w", encoding="utf-8") as file:
            file.write(content)

    # -- directives: what Kiro tells besides

    def do_context(self, percent):
        """`!context PERCENT`: so much of the context is used."""
        self.session.settings["context"] = float(percent)
        self.session.save()

    def do_title(self, title):
        """`!title TEXT`: the session's title; \\n is a line break."""
        self.agent.update(self.session.id, {"sessionUpdate": "session_info_update", "title": title.replace("\\n", "\n")})

    def do_credits(self, values):
        """`!credits A B`: what the turn costs."""
        self.credits = [float(value) for value in values.split()]

    def do_compaction(self, _):
        """`!compaction`: the conversation is summarised."""
        self.notify("compaction/status", status={"type": "started"})
        self.notify("compaction/status", status={"type": "completed"}, summary="We talked.")

    def do_discard(self, _):
        """`!discard`: what was said in this attempt is taken back."""
        self.updates.clear()
        self.notify("session/update", update={"sessionUpdate": "stream_discarded"})

    def do_retry_warning(self, text):
        """`!retry_warning [TEXT]`: Kiro tries again."""
        self.notify("session/update", update={"sessionUpdate": "retry_warning", "attempt": 1, "maxAttempts": 3,
                                              "delaySecs": 2, "message": text or "Trying again"})

    def do_rate_limit(self, text):
        """`!rate_limit [TEXT]`: Kiro is being slowed down."""
        self.notify("error/rate_limit", message=text or "Too many requests")

    def do_oauth(self, url):
        """`!oauth URL`: an MCP server wants a login."""
        self.notify("mcp/oauth_request", serverName="tracker", oauthUrl=url)

    # -- directives: how a turn ends

    def do_stop_reason(self, reason):
        """`!stop_reason REASON`: end with this stop reason, a list or object if it looks like one."""
        raise TurnOver(json.loads(reason) if reason[0] in "[{" else reason)

    def do_error(self, code_and_text):
        """`!error CODE TEXT`: the prompt fails, with the text in `data`."""
        code, _, text = code_and_text.partition(" ")
        raise Refusal(int(code), "Internal error", text)

    def do_error_object(self, code_and_text):
        """`!error_object CODE TEXT`: the prompt fails, with the text in an object in `data`."""
        code, _, text = code_and_text.partition(" ")
        raise Refusal(int(code), "Internal error", {"details": text})

    def do_turn_end(self, how):
        """`!turn_end [exit]`: a turn_end update and no response."""
        self.remember()
        self.agent.update(self.session.id, {"sessionUpdate": "turn_end"})
        if how == "exit":
            self.agent.leave(0)
        raise TurnOver(None)

    def do_interrupted(self, _):
        """`!interrupted`: the chunk that Kiro's security filter leaves, and no response."""
        self.say("Tool uses were interrupted, waiting for the next user prompt")
        self.remember()
        raise TurnOver(None)

    # -- directives: misbehaving

    def do_exit(self, code_and_text):
        """`!exit CODE [TEXT]`: the process exits, with TEXT on stderr, and leaves its lock behind."""
        code, _, text = code_and_text.partition(" ")
        os.write(2, text.replace("\\n", "\n").encode() + b"\n")
        self.agent.leave(int(code), clean=False)

    def do_kill(self, _):
        """`!kill`: the process is killed."""
        os.kill(os.getpid(), signal.SIGKILL)

    def do_junk(self, _):
        """`!junk`: lines that are no frames, and frames that make no sense."""
        self.agent.send_junk()
        for update in (None, {}, {"sessionUpdate": "agent_message_chunk"}, {"sessionUpdate": None},
                       {"sessionUpdate": "agent_message_chunk", "content": None},
                       {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": None}},
                       {"sessionUpdate": "agent_message_chunk", "content": {"type": "image"}},
                       {"sessionUpdate": "tool_call"},
                       {"sessionUpdate": "tool_call", "toolCallId": [1], "title": {}, "kind": [], "status": ["failed"]},
                       {"sessionUpdate": "no_such_update", "content": []}):
            self.agent.update(self.session.id, update)

    def do_bigline(self, megabytes):
        """`!bigline MB`: a tool's output in one line of that size."""
        content = [{"type": "content", "content": text_block("x" * (int(megabytes) * 2**20))}]
        self.agent.update(self.session.id,
                          {"sessionUpdate": "tool_call_update", "toolCallId": "tooluse_big", "content": content})

    def do_stderr(self, kilobytes):
        """`!stderr KB`: so much on stderr."""
        for _ in range(int(kilobytes)):
            os.write(2, b"x" * 1023 + b"\n")

    def do_raw(self, line):
        """`!raw LINE`: this line on stdout, as it is."""
        self.agent.wire.note("out", line)
        self.agent.wire.write_line(line.encode())

    def do_raw_file(self, name):
        """`!raw_file NAME`: the file NAME of the control folder on stdout, as it is."""
        with open(os.path.join(self.agent.control or "", name), "rb") as file:
            self.agent.wire.write_line(file.read().strip())

    def do_close_stdout(self, _):
        """`!close_stdout`: stdout ends, the process doesn't."""
        os.close(1)

    def do_spawn(self, words):
        """`!spawn [setsid] [pipes]`: leave a process behind, in a session of its own, holding our pipes."""
        import subprocess
        stream = None if "pipes" in words else subprocess.DEVNULL
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL,
                         stdout=stream, stderr=stream, start_new_session="setsid" in words)

    def do_zombie(self, _):
        """`!zombie`: leave a dead process in our group for which nobody waits; its parent is no longer ours."""
        import subprocess
        script = ("import os, time; ours = os.getpgrp(); os.setpgid(0, 0); dead = os.fork()\n"
                  "if not dead: os.setpgid(0, ours); os._exit(0)\n"
                  "os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT); print(flush=True); time.sleep(600)")
        subprocess.Popen([sys.executable, "-c", script], env={"KIRO_STAND_IN": self.agent.control},
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE).stdout.readline()


if __name__ == "__main__" and sys.argv[1:2] not in (["bench"], ["load"], ["kills"], ["watch"], ["nursery"]):
    StandInKiro().run()

# ---------------------------------------------------------------------------------------------------------
# The stand-in Telegram: what it keeps
# ---------------------------------------------------------------------------------------------------------

import collections
import contextlib
import functools
import http.server
import inspect
import pty
import random
import re
import select
import shlex
import shutil
import socket
import socketserver
import sqlite3
import statistics
import struct
import subprocess
import tempfile
import urllib.parse
import zlib
from dataclasses import dataclass, field as attribute
from pathlib import Path

TOKEN = "123456:AAFakeTokenOfTheStandInTelegram_0000"
ALICE = {"id": 1001, "is_bot": False, "first_name": "Alice", "username": "alice", "language_code": "en"}
BOB = {"id": 1002, "is_bot": False, "first_name": "Bob", "language_code": "de"}
MALLORY = {"id": 6666, "is_bot": False, "first_name": "Mallory", "language_code": "en"}
GROUP = {"id": -1001234567890, "type": "supergroup", "title": "A group", "is_forum": True}

ANY = object()  # any topic; None is the chat's root
LASTING = ("sendMessage", "sendRichMessage", "sendPhoto", "sendDocument")
DRAFT = "sendMessageDraft"


@dataclass
class Call:
    """One request of the bot's, as it arrived."""

    number: int
    method: str
    params: dict  # by the types that the method wants
    files: dict  # parameter -> (file name, bytes)
    time: float  # time.monotonic() at arrival
    ok: bool = None  # True: carried out; False: refused; None: not yet
    result: object = None  # what was answered: the result, or the description of the error

    @property
    def thread(self):
        return self.params.get("message_thread_id")

    @property
    def text(self):
        rich = self.params.get("rich_message") or {}
        return self.params.get("text") or rich.get("markdown") or self.params.get("caption") or ""

    @property
    def message(self):
        """The message that was sent, as it was then."""
        return self.result if isinstance(self.result, dict) else None

    def __str__(self):
        outcome = {True: "ok", False: f"refused: {self.result}", None: "not answered"}[self.ok]
        return f"{self.time:.3f} #{self.number} {self.method} thread={self.thread} {self.text[:200]!r} {outcome}"


class ApiError(Exception):
    """A refusal as the Bot API answers it."""

    def __init__(self, code, description, **parameters):
        super().__init__(description)
        self.code = code
        self.body = {"ok": False, "error_code": code, "description": description}
        if parameters:
            self.body["parameters"] = parameters


def bad_request(description):
    return ApiError(400, "Bad Request: " + description)


class Dropped(Exception):
    """A request whose connection is closed without an answer."""


def utf16_length(text):
    """Telegram's way of counting; a lone half of a pair is refused."""
    try:
        return len(text.encode("utf-16-le")) // 2
    except UnicodeEncodeError:
        raise bad_request("strings must be encoded in UTF-8") from None


# ---------------------------------------------------------------------------------------------------------
# The stand-in Telegram: Rich Markdown
# ---------------------------------------------------------------------------------------------------------

CODE = re.compile(r"^[ >]*(`{3,}|~{3,})[^\n]*\n.*?(?:^[ >]*\1[`~]*[ ]*$|\Z)"
                  r"|(?<![`\\])(`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)\2(?!`)",
                  re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?: {4}.*\n?)+")
LINK = re.compile(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^\s)>]*)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]^]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
HREF = re.compile(r"<(?:a|img)\b[^>]*?(?:href|src)\s*=\s*[\"']?([^\"'\s>]*)", re.IGNORECASE)
GOOD_TARGET = re.compile(r"(?:https?://[^\s/?#:@]+\.[^\s/?#:@]+|tg://\w|mailto:[^@\s]+@\S+\.\S)", re.IGNORECASE)
AUTOLINK = re.compile(r"<(?:https?://|mailto:|tg://)[^\s<>]+>", re.IGNORECASE)
ODD_EMAIL = re.compile(r"\b\w[\w.+-]*:[\w.+-]+@[\w-]+\.\w")
BLOCK_START = re.compile(r"\s*(?:[-*+]\s|\d+[.)]\s|#{1,6}\s|>|\[\^?\w+\]:|([-*_])(?:\s*\1){2,}\s*$|<|CODE)")
ITEM = re.compile(r"[\s>]*(?:[-*+]|\d+[.)])\s")
COMPLETE = re.compile(r"\s*(?:#|CODE|<|(?:[-*_=]\s*){3,}$)")
UNDERLINE = re.compile(r"\s*(?:=+|-+)\s*")
DELIMITER_ROW = re.compile(r"[\s>]*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")
TAG = re.compile(r"<!--|</?([A-Za-z][\w-]*)[^>\n]*>")
TAGS = {"a", "b", "br", "blockquote", "cite", "code", "del", "details", "em", "hr", "i", "img", "li", "mark",
        "ol", "p", "pre", "s", "strong", "sub", "summary", "sup", "table", "td", "th", "tr", "u", "ul", "aside",
        "tg-button", "tg-collage", "tg-emoji", "tg-map", "tg-slideshow", "tg-spoiler"}


def without_code(markdown):
    """The Markdown with code blocks, inline code and escaped characters taken out."""
    markdown = INDENTED.sub("\nCODE\n", CODE.sub(lambda code: "CODE" if code[1] else "code", markdown))
    return re.sub(r"\\[^\w\s]", "E", markdown)


def cells(row):
    return row.strip(" >").strip("|").count("|") + 1


def table_rows(lines):
    """The numbers of the lines that belong to a table."""
    rows = set()
    for number, line in enumerate(lines):
        if "|" in line and number and DELIMITER_ROW.fullmatch(line) and "|" in lines[number - 1]:
            end = number
            while end < len(lines) and "|" in lines[end]:
                end += 1
            rows.update(range(number - 1, end))
    return rows


def blocks(lines):
    """How many blocks Telegram would count: each paragraph, row, heading or piece of code is one, an item is two."""
    rows = table_rows(lines)
    return sum(1 + bool(ITEM.match(line)) for number, (before, line) in enumerate(zip([""] + lines, lines))
               if line.strip() and (not before.strip() or number in rows or BLOCK_START.match(line)))


def nesting(line):
    quotes = re.match(r"[\s>]*", line)[0].count(">")
    indentation = len(re.match(r"\s*", line)[0]) // 2 if re.match(r"\s*([-*+]|\d+[.)])\s", line) else 0
    return max(quotes, indentation)


def rich_refusal(markdown, detection=True):
    """Why Telegram would refuse this Rich Markdown; None when it would not."""
    text = without_code(markdown)
    lines = text.splitlines()
    targets = [target for _, target in LINK.findall(text)] + REFERENCE.findall(text) + HREF.findall(text)
    if not re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL).strip():
        return "Rich message must be non-empty"
    if len(markdown) > 32768:
        return "RICH_MESSAGE_TEXT_TOO_LONG"
    if blocks(lines) > 500:
        return "RICH_MESSAGE_BLOCKS_TOO_MANY"
    if any(nesting(line) > 16 for line in lines):
        return "RICH_MESSAGE_DEPTH_INVALID"
    if any(cells(lines[number]) > 20 for number in table_rows(lines)):
        return "RICH_MESSAGE_TABLE_COLS_TOO_MANY"
    if any(mark for mark, _ in LINK.findall(text)) or re.search(r"<img\b|!\[[^\]]*\]\[", text, re.IGNORECASE):
        return "RICH_MESSAGE_PHOTO_NO_MEDIA_FOUND"
    if not all(GOOD_TARGET.match(target) for target in targets):
        return "RICH_MESSAGE_URL_INVALID"
    if detection and ODD_EMAIL.search(text):
        return "RICH_MESSAGE_EMAIL_INVALID"
    return None


def garbled_lines(markdown):
    """The (reason, line) of what Telegram would take but show otherwise than it is meant."""
    lines = without_code(markdown).splitlines()
    rows = table_rows(lines)
    for number, line in enumerate(lines):
        words = AUTOLINK.sub("", line)
        if any(name.lower() not in TAGS for name in TAG.findall(words)):
            yield "raw HTML", line
        if "==" in words and words.strip("= "):
            yield "marked text", line
        if "||" in words and number not in rows:
            yield "a spoiler", line
        if re.match(r"\s{0,3}#+[^#\s]", line):
            yield "a heading", line
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if paragraph.count("$") > 1:
            yield "a formula", paragraph
    yield from soft_breaks(lines, rows)


def soft_breaks(lines, rows):
    """Lines that Telegram would join with the next one."""
    for number, (line, following) in enumerate(zip(lines, lines[1:])):
        quoted = line.lstrip().startswith(">") and following.lstrip().startswith(">")
        text, following = (part.lstrip(" >") if quoted else part for part in (line, following))
        ends = not text.strip() or number in rows or line.endswith("  ") or COMPLETE.match(text)
        begins = (not following.strip() or BLOCK_START.match(following) or UNDERLINE.fullmatch(following)
                  or number + 1 in rows)
        if not ends and not begins:
            yield "a line break that is lost", line


# ---------------------------------------------------------------------------------------------------------
# The stand-in Telegram: the methods of the Bot API
# ---------------------------------------------------------------------------------------------------------

TARGET = {"chat_id": int, "message_thread_id": int}
SENDING = {**TARGET, "disable_notification": bool, "protect_content": bool, "message_effect_id": str,
           "reply_markup": dict}
TEXT = {"text": str, "parse_mode": str, "entities": list}
CAPTION = {"caption": str, "parse_mode": str, "caption_entities": list}
PARAMETERS = {
    "getMe": {},
    "getUpdates": {"offset": int, "limit": int, "timeout": int, "allowed_updates": list},
    "deleteWebhook": {"drop_pending_updates": bool},
    "setMyCommands": {"commands": list, "scope": dict, "language_code": str},
    "sendMessage": {**SENDING, **TEXT, "link_preview_options": dict},
    "sendMessageDraft": {**TARGET, **TEXT, "draft_id": int, "can_stop": bool, "keep_on_stop": bool},
    "sendRichMessage": {**SENDING, "rich_message": dict},
    "sendChatAction": {**TARGET, "action": str},
    "sendPhoto": {**SENDING, **CAPTION, "has_spoiler": bool, "show_caption_above_media": bool},
    "sendDocument": {**SENDING, **CAPTION, "disable_content_type_detection": bool},
    "editMessageText": {"chat_id": int, "message_id": int, **TEXT, "link_preview_options": dict,
                        "reply_markup": dict},
    "answerCallbackQuery": {"callback_query_id": str, "text": str, "show_alert": bool, "url": str, "cache_time": int},
    "setMessageReaction": {"chat_id": int, "message_id": int, "reaction": list, "is_big": bool},
    "getFile": {"file_id": str},
    "editForumTopic": {**TARGET, "name": str, "icon_custom_emoji_id": str},
}
REQUIRED = {"chat_id", "draft_id", "message_id", "callback_query_id", "file_id", "commands"}
EXPECTED_UPDATES = {"message", "edited_message", "callback_query", "stopped_message_generation"}
CONFLICT = "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running"
NOT_MODIFIED = ("message is not modified: specified new message content and reply markup are exactly the same "
                "as a current content and reply markup of the message")
REACTIONS = set(
    "👍 👎 ❤ 🔥 🥰 👏 😁 🤔 🤯 😱 🤬 😢 🎉 🤩 🤮 💩 🙏 👌 🕊 🤡 🥱 🥴 😍 🐳 🌚 🌭 💯 🤣 ⚡ 🍌 🏆 💔 🤨 "
    "😐 🍓 🍾 💋 😈 😴 😭 🤓 👻 👀 🎃 🙈 😇 😨 🤝 ✍ 🤗 🫡 🎅 🎄 ☃ 💅 🤪 🗿 🆒 💘 🙉 🦄 😘 💊 🙊 😎 👾 🤷 😡".split())
MEGABYTE = 2**20


def typed(name, value, kind):
    """A parameter as its method wants it; in a form everything is text."""
    if isinstance(value, str) and kind in (list, dict):
        value = json.loads(value)
    elif isinstance(value, str) and kind is bool:
        value = {"True": True, "False": False}.get(value, value)
    elif isinstance(value, str) and kind is int:
        value = int(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is no {kind.__name__}: {value!r}")
    return value


def photo_refusal(data):
    """Why Telegram would not take these bytes as a photo."""
    if len(data) > 10 * MEGABYTE:
        return "too big for a photo"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack(">II", data[16:24]) if len(data) > 24 else (0, 0)
        if not width or not height or b"IEND" not in data[-64:]:
            return "IMAGE_PROCESS_FAILED"
        if width + height > 10000 or max(width, height) > 20 * min(width, height):
            return "PHOTO_INVALID_DIMENSIONS"
    elif not data.startswith((b"\xff\xd8\xff", b"GIF8")) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return "IMAGE_PROCESS_FAILED"
    return None


class BotApi:
    """The state of the server, and its methods under the names that they have in the Bot API."""

    ME = {"id": int(TOKEN.partition(":")[0]), "is_bot": True, "first_name": "Kiro", "username": "kiro_test_bot",
          "can_join_groups": True, "can_read_all_group_messages": False, "supports_inline_queries": False}

    def __init__(self):
        self.changed = threading.Condition()  # guards and announces everything below
        self.topics_enabled = True
        self.local = None  # a folder: getFile then answers as a local Bot API server, with paths in it
        self.calls = []  # all of them, in order of arrival
        self.violations = []  # what a bot should never do
        self.garbled = []  # (reason, text) of rich messages that would not look as they are meant
        self.pending = []  # updates that were not yet acknowledged
        self.redelivered = []  # updates that are delivered again although they were
        self.dropped = []  # updates of a type that was not asked for
        self.acknowledged = 0  # every update below this id
        self.poll = None  # the newest getUpdates
        self.held = False  # no update is delivered
        self.impatient = False  # getUpdates is answered at once
        self.closed = False
        self.last_id = 100  # of messages, topics and callback queries
        self.chats = {}  # chat id -> chat
        self.topics = set()  # (chat id, thread)
        self.names = {}  # (chat id, thread) -> the topic's name, where it is known
        self.messages = {}  # (chat id, message id) -> message, as it is now
        self.queries = set()  # ids of the callback queries that can be answered
        self.files = {}  # file id -> (path, bytes, size)
        self.commands = None

    # -- what the methods share

    def next_id(self):
        self.last_id += 1
        return self.last_id

    def violation(self, complaint):
        with self.changed:
            self.violations.append(complaint)

    def chat(self, params):
        if params["chat_id"] not in self.chats:
            raise bad_request("chat not found")
        return self.chats[params["chat_id"]]

    def own_message(self, params):
        message = self.messages.get((params["chat_id"], params["message_id"]))
        if message is None:
            raise bad_request("message to edit not found")
        if message["from"] != self.ME:
            raise bad_request("message can't be edited")
        return message

    def check_text(self, text, longest=4096, description="message is too long"):
        if utf16_length(text) > longest:
            raise bad_request(description)

    def check_entities(self, text, entities):
        units = text.encode("utf-16-le")
        if len(entities) > 100:
            raise bad_request("too many entities")
        for entity in entities:
            start, end = 2 * entity["offset"], 2 * (entity["offset"] + entity["length"])
            if entity["type"] not in ("pre", "code") or not 0 <= start < end <= len(units):
                raise bad_request("can't parse entities")
            units[start:end].decode("utf-16-le")  # no half of a character

    def check_rich(self, rich):
        if len({"markdown", "html", "blocks"} & set(rich)) != 1:
            raise bad_request("RICH_MESSAGE_CONTENT_REQUIRED")
        markdown = rich.get("markdown")
        if not isinstance(markdown, str):
            return
        utf16_length(markdown)
        refusal = rich_refusal(markdown, detection=not rich.get("skip_entity_detection"))
        if refusal:
            raise bad_request(refusal)
        self.garbled.extend(garbled_lines(markdown))

    def check_markup(self, markup):
        buttons = [button for row in markup.get("inline_keyboard", []) for button in row]
        if len(buttons) > 100 or len(json.dumps(markup, ensure_ascii=False).encode()) > 10_000:
            raise bad_request("REPLY_MARKUP_TOO_LONG")
        for button in buttons:
            data = button.get("callback_data", "")
            if not button.get("text", "").strip():
                raise bad_request("inline keyboard button text must be non-empty")
            if len({"callback_data", "copy_text", "url"} & set(button)) != 1:
                raise bad_request("BUTTON_TYPE_INVALID")
            if "copy_text" in button and not 1 <= len(button["copy_text"]["text"]) <= 256:
                raise bad_request("BUTTON_COPY_TEXT_INVALID")
            if button.get("style", "primary") not in ("primary", "success", "danger"):
                raise bad_request("BUTTON_STYLE_INVALID")
            if "url" in button and not GOOD_TARGET.match(button["url"]):
                raise bad_request("BUTTON_URL_INVALID")
            if "callback_data" in button and not 1 <= len(data.encode()) <= 64:
                raise bad_request("BUTTON_DATA_INVALID")

    def send(self, params, **content):
        """Send a message of the bot's."""
        chat = self.chat(params)
        thread = params.get("message_thread_id")
        if thread is not None and (chat["id"], thread) not in self.topics:
            raise bad_request("message thread not found")
        message = {"message_id": self.next_id(), "from": self.ME, "chat": chat, "date": int(time.time()), **content}
        if thread is not None:
            message.update(message_thread_id=thread, is_topic_message=True)
        if "reply_markup" in params:
            self.check_markup(params["reply_markup"])
            message["reply_markup"] = params["reply_markup"]
        self.messages[chat["id"], message["message_id"]] = message
        return dict(message)

    def upload(self, call, name, largest):
        """The bytes that come with a call."""
        if name in call.files:
            data = call.files[name][1]
        else:
            raise bad_request(f"there is no {name} in the request")
        if not data:
            raise bad_request("file must be non-empty")
        if len(data) > largest:
            raise ApiError(413, "Request Entity Too Large")
        return data

    def new_file(self, kind, data, size=None, **more):
        """A file that can be downloaded, as messages describe it."""
        with self.changed:
            file_id = f"{kind}-{self.next_id()}"
            size = len(data) if size is None else size
            self.files[file_id] = (f"files/{file_id}", data, size)
        return {"file_id": file_id, "file_unique_id": file_id, "file_size": size, **more}

    # -- the bot itself

    def getMe(self, call):
        return {**self.ME, "has_topics_enabled": self.topics_enabled, "allows_users_to_create_topics": True}

    def deleteWebhook(self, call):
        return True

    def setMyCommands(self, call):
        for command in call.params["commands"]:
            if not re.fullmatch(r"[a-z0-9_]{1,32}", command.get("command", "")):
                raise bad_request("BOT_COMMAND_INVALID")
            if not 1 <= len(command.get("description", "")) <= 256:
                raise bad_request("BOT_COMMAND_DESCRIPTION_INVALID")
        self.commands = call.params["commands"]
        return True

    def getUpdates(self, call):
        if self.impatient:
            call.params["timeout"] = 0
        offset, limit = call.params.get("offset", 0), call.params.get("limit", 100)
        wanted = set(call.params.get("allowed_updates", EXPECTED_UPDATES))
        if not EXPECTED_UPDATES <= set(call.params.get("allowed_updates", ())):
            self.violation(f"getUpdates with allowed_updates {call.params.get('allowed_updates')}")
        if offset < 0 or not 1 <= limit <= 100:
            self.violation(f"getUpdates with offset {offset} and limit {limit}")
            raise bad_request("offset or limit is invalid")
        self.poll = call
        self.acknowledged = max(self.acknowledged, offset)
        self.pending = [update for update in self.pending if update["update_id"] >= offset]
        self.changed.notify_all()
        deadline = time.monotonic() + min(call.params.get("timeout", 0), 50)
        while not (batch := self.batch(wanted, limit)) and (remaining := deadline - time.monotonic()) > 0:
            self.changed.wait(remaining)
            if self.closed:
                raise Dropped
            if self.poll is not call:
                raise ApiError(409, CONFLICT)
        return batch

    def batch(self, wanted, limit):
        """The next updates, without those of a type that is not wanted: they are gone."""
        if self.held:
            return []
        unwanted = [update for update in self.pending if not wanted & set(update)]
        self.pending = [update for update in self.pending if update not in unwanted]
        self.dropped.extend(unwanted)
        again, self.redelivered = self.redelivered, []
        return (again + self.pending)[:limit]

    # -- messages

    def sendMessage(self, call):
        text = call.params.get("text", "")
        if not text.strip():
            raise bad_request("message text is empty")
        self.check_text(text)
        self.check_entities(text, call.params.get("entities") or [])
        return self.send(call.params, text=text)

    def sendMessageDraft(self, call):
        chat = self.chat(call.params)
        if chat["type"] != "private":
            raise bad_request("TEXTDRAFT_PEER_INVALID")
        if not 0 < abs(call.params["draft_id"]) < 2**63:
            raise bad_request("RANDOM_ID_INVALID")
        self.check_text(call.params.get("text", ""))
        return True

    def sendChatAction(self, call):
        self.chat(call.params)
        if call.params.get("action") != "typing":
            raise bad_request("wrong parameter action in request")
        return True

    def sendRichMessage(self, call):
        rich = call.params.get("rich_message") or {}
        self.check_rich(rich)
        return self.send(call.params, rich_message={"blocks": [{"type": "paragraph", "text": rich.get("markdown")}]})

    def sendPhoto(self, call):
        data = self.upload(call, "photo", largest=50 * MEGABYTE)
        refusal = photo_refusal(data)
        if refusal:
            raise bad_request(refusal)
        return self.send(call.params, photo=[self.new_file("photo", data, width=1, height=1)], **self.caption(call))

    def sendDocument(self, call):
        data = self.upload(call, "document", largest=50 * MEGABYTE)
        return self.send(call.params, document=self.new_file("document", data), **self.caption(call))

    def caption(self, call):
        caption = call.params.get("caption", "")
        self.check_text(caption, 1024, "message caption is too long")
        return {"caption": caption} if caption else {}

    def setMessageReaction(self, call):
        if (call.params["chat_id"], call.params["message_id"]) not in self.messages:
            raise bad_request("message to react not found")
        reaction = call.params.get("reaction", [])
        if len(reaction) > 1 or any(one.get("emoji") not in REACTIONS for one in reaction):
            raise bad_request("REACTION_INVALID")
        return True

    def editMessageText(self, call):
        message = self.own_message(call.params)
        text = call.params.get("text", "")
        if not text.strip():
            raise bad_request("message text is empty")
        self.check_text(text)
        return self.edited(message, text, call.params.get("reply_markup"))

    def edited(self, message, text, markup):
        """Change a message; without a keyboard in the call it has none any more."""
        markup = markup if markup and markup.get("inline_keyboard") else None
        self.check_markup(markup or {})
        if (message.get("text"), message.get("reply_markup")) == (text, markup):
            raise bad_request(NOT_MODIFIED)
        message.update(text=text, reply_markup=markup)
        if not markup:
            del message["reply_markup"]
        return dict(message)

    def answerCallbackQuery(self, call):
        if call.params["callback_query_id"] not in self.queries:
            raise bad_request("query is too old and response timeout expired or query ID is invalid")
        self.check_text(call.params.get("text", ""), 200, "MESSAGE_TOO_LONG")
        return True

    # -- files and topics

    def editForumTopic(self, call):
        key = self.chat(call.params)["id"], call.params.get("message_thread_id")
        name = call.params.get("name", "")
        if key not in self.topics:
            raise bad_request("TOPIC_ID_INVALID")
        if not 1 <= len(name) <= 128 or name == self.names.get(key):
            raise bad_request("TOPIC_NOT_MODIFIED")
        self.names[key] = name
        self.post(self.ME, key[1], self.chats[key[0]], forum_topic_edited={"name": name})
        return True

    def getFile(self, call):
        if call.params["file_id"] not in self.files:
            raise bad_request("wrong file_id or the file is temporarily unavailable")
        path, data, size = self.files[call.params["file_id"]]
        if self.local:
            stored = Path(self.local) / path.replace("/", "-")
            stored.write_bytes(data)
            path = str(stored)
        elif size > 20 * MEGABYTE:
            raise bad_request("file is too big")
        return {"file_id": call.params["file_id"], "file_unique_id": path, "file_size": size, "file_path": path}


# ---------------------------------------------------------------------------------------------------------
# The stand-in Telegram: HTTP
# ---------------------------------------------------------------------------------------------------------


def form_fields(content_type, body):
    """The (parameters, files) of a request's body."""
    if not body:
        return {}, {}
    if content_type.startswith("application/x-www-form-urlencoded"):
        return dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=True)), {}
    if content_type.startswith("multipart/form-data"):
        return multipart_fields(content_type.partition("boundary=")[2].strip('"').encode(), body)
    raise ValueError(f"content type {content_type!r}")


DISPOSITION = re.compile(r'form-data; name="?([^";]*)"?(?:; filename=(?:"([^"]*)"|([^";]*)))?')


def multipart_fields(boundary, body):
    params, files = {}, {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        disposition = re.search("Content-Disposition: (.*)", head.decode())[1].strip()
        found = DISPOSITION.fullmatch(disposition)  # telebot doesn't quote: a name with ; or " breaks the header
        if not found:
            raise ValueError(disposition)
        name, content = found[1], content.removesuffix(b"\r\n")
        if "filename=" in disposition:
            files[name] = (found[2] or found[3] or "", content)
        else:
            params[name] = content.decode()
    return params, files


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of the bot's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def body(self):
        """The request's body, in one or in pieces; None when the bot has ended in the middle of it."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            return body if len(body) == length else None
        pieces = []
        while size := int(self.rfile.readline() or b"-1", 16):
            pieces.append(self.rfile.read(size + 2)[:-2])
            if size < 0 or len(pieces[-1]) < size:
                return None
        self.rfile.readline()
        return b"".join(pieces)

    def do_POST(self):
        body = self.body()
        if body is None:
            self.close_connection = True
            return
        try:
            status, content_type, answer = self.server.telegram.answer_http(
                self.path, self.headers.get("Content-Type", ""), body)
        except Dropped:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingTCPServer):
    """Accepts connections on a port of this machine, and can drop them all."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, telegram, port=0):
        self.telegram = telegram
        self.connections = set()
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@dataclass
class TelegramFault:
    """Something that goes wrong with the calls of one method."""

    method: str  # "*" for all but getUpdates
    status: int = None  # answer this instead of carrying the call out
    description: str = ""
    retry_after: int = None
    html: bool = False  # the answer is a page of some proxy's
    drop: str = None  # close the connection: "before" or "after" the call is carried out
    hang: float = None  # carry it out, but answer only so many seconds later, or when the fault ends
    times: int = 1  # None: until it ends
    when: object = None  # a function of the call: only such calls
    hits: int = 0
    over: threading.Event = attribute(default_factory=threading.Event)

    def end(self):
        self.over.set()

    def applies(self, call):
        if self.over.is_set() or (self.times is not None and self.hits >= self.times):
            return False
        if self.method != call.method and (self.method != "*" or call.method == "getUpdates"):
            return False
        return self.when is None or self.when(call)

    def answer(self):
        """The (status, content type, body) to answer instead."""
        if self.html:
            return self.status, "text/html", b"<html><head><title>Bad Gateway</title></head></html>"
        parameters = {} if self.retry_after is None else {"retry_after": self.retry_after}
        default = {401: "Unauthorized", 409: CONFLICT, 429: f"Too Many Requests: retry after {self.retry_after}"}
        description = self.description or default.get(self.status, "Internal Server Error")
        return json_answer(self.status, ApiError(self.status, description, **parameters).body)


def json_answer(status, body):
    return status, "application/json", json.dumps(body).encode()


class StandInTelegram(BotApi):
    """The server as the tests see it: its calls, the people who write to the bot, and its faults."""

    def __init__(self):
        super().__init__()
        self.faults = []
        self.positions = {}  # (chat id, message id) of what people wrote -> how many calls came before
        self.sent_updates = []
        self.last_update_id = 5000
        self.server = Server(self)
        self.port = self.server.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for fault in self.faults:
            fault.end()
        if self.server:
            self.server.stop()

    # -- answering

    def answer_http(self, path, content_type, body):
        """Answer one request; what the server could not read at all is a violation."""
        url = urllib.parse.urlsplit(path)
        if url.query:
            self.violation(f"parameters in the URL of {url.path.rpartition('/')[2]}")
            return 414, "text/html", b"<html>414 Request-URI Too Large</html>"
        if not url.path.startswith((f"/bot{TOKEN}/", f"/file/bot{TOKEN}/")):
            return json_answer(401, ApiError(401, "Unauthorized").body)
        if url.path.startswith("/file/"):
            return self.answer_download(urllib.parse.unquote(url.path.removeprefix(f"/file/bot{TOKEN}/")))
        try:
            params, files = form_fields(content_type, body)
        except (ValueError, KeyError) as error:
            self.violation(f"a body that can't be read: {error}")
            return json_answer(400, bad_request("can't parse the request").body)
        return self.answer_call(self.arrived(url.path.rpartition("/")[2], params, files))

    def arrived(self, method, params, files):
        """The call, recorded."""
        with self.changed:
            params = {name: self.parameter(method, name, value) for name, value in params.items()}
            call = Call(len(self.calls), method, params, files, time.monotonic())
            self.calls.append(call)
            self.changed.notify_all()
        return call

    def parameter(self, method, name, value):
        kind = PARAMETERS.get(method, {}).get(name)
        try:
            if kind is None:
                raise ValueError(f"{name} is not known")
            return typed(name, value, kind)
        except ValueError as error:
            self.violation(f"{method}: {error}")
            return value

    def answer_call(self, call):
        fault = self.fault_for(call)
        if fault and fault.drop == "before":
            raise Dropped
        if fault and fault.status:
            self.settle(call, False, fault.status)
            return fault.answer()
        answer = self.carry_out(call)
        if fault and fault.hang is not None:
            fault.over.wait(fault.hang)
        if fault and fault.drop == "after":
            raise Dropped
        return answer

    def fault_for(self, call):
        with self.changed:
            fault = next((fault for fault in self.faults if fault.applies(call)), None)
            if fault:
                fault.hits += 1
            return fault

    def carry_out(self, call):
        try:
            with self.changed:
                if call.method not in PARAMETERS:
                    raise ApiError(404, "Not Found")
                for name in REQUIRED & set(PARAMETERS[call.method]) - set(call.params):
                    raise bad_request(f"parameter {name} is required")
                result = getattr(self, call.method)(call)
                self.settle(call, True, result)
            return json_answer(200, {"ok": True, "result": result})
        except ApiError as error:
            self.settle(call, False, str(error))
            return json_answer(error.code, error.body)

    def settle(self, call, ok, result):
        with self.changed:
            call.ok, call.result = ok, result
            self.changed.notify_all()

    def answer_download(self, path):
        call = self.arrived("download", {}, {})
        call.params["path"] = path
        fault = self.fault_for(call)
        if fault and fault.drop:
            raise Dropped
        if fault and fault.status:
            return fault.answer()
        if fault and fault.hang is not None:
            fault.over.wait(fault.hang)
        data = next((data for known, data, _ in self.files.values() if known == path), None)
        self.settle(call, data is not None, path)
        if data is None:
            return json_answer(404, ApiError(404, "Not Found").body)
        return 200, "application/octet-stream", data

    # -- faults

    def fault(self, method, **how):
        """Let the next calls of `method` go wrong; see Fault for how."""
        fault = TelegramFault(method, **how)
        with self.changed:
            self.faults.append(fault)
        return fault

    def outage(self):
        """Refuse connections, and drop those that there are; nobody else gets the port meanwhile."""
        self.server.stop()
        self.server = None
        self.placeholder = socket.socket()
        self.placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.placeholder.bind(("127.0.0.1", self.port))
        with self.changed:
            self.poll = None
            self.changed.notify_all()

    def end_outage(self):
        self.server = Server(self, self.port)
        self.placeholder.close()

    # -- what people do

    def deliver(self, **content):
        """Queue an update; returns it."""
        with self.changed:
            self.last_update_id += 1
            update = {"update_id": self.last_update_id, **content}
            self.sent_updates.append(update)
            self.pending.append(update)
            self.changed.notify_all()
        return update

    @contextlib.contextmanager
    def batch_of_updates(self):
        """What happens inside is delivered at once."""
        self.held = True
        try:
            yield
        finally:
            with self.changed:
                self.held = False
                self.changed.notify_all()

    def open_topic(self, thread, user=ALICE, chat=None):
        with self.changed:
            chat = chat or {"id": user["id"], "type": "private", "first_name": user["first_name"]}
            self.chats[chat["id"]] = chat
            if thread is not None:
                self.topics.add((chat["id"], thread))
        return chat

    def name_topic(self, thread, name, created=True, user=ALICE, **fields):
        """A person opens a topic with this name, or gives it to one; is_name_implicit=True: it is what they wrote there."""
        with self.changed:
            self.names[user["id"], thread] = name
        news = {"name": name, "icon_color": 7322096, **fields} if created else {"name": name}
        return self.post(user, thread, **{"forum_topic_created" if created else "forum_topic_edited": news})

    def delete_topic(self, thread, user=ALICE):
        """A person deletes a topic: the bot is not told."""
        with self.changed:
            self.topics.discard((user["id"], thread))

    def post(self, user=ALICE, thread=None, chat=None, reply_to=None, quote=None, **content):
        """Send a message with any content; returns it. thread=None is the chat's root."""
        chat = self.open_topic(thread, user, chat)
        with self.changed:
            message = {"message_id": self.next_id(), "from": user, "chat": chat, "date": int(time.time()), **content}
            if thread is not None:
                message.update(message_thread_id=thread, is_topic_message=True)
            if reply_to is not None:
                message["reply_to_message"] = self.plain_message(reply_to)
            if quote is not None:
                message["quote"] = {"position": 0, "is_manual": True, **(quote if isinstance(quote, dict) else {"text": quote})}
            self.messages[chat["id"], message["message_id"]] = message
            self.positions[chat["id"], message["message_id"]] = len(self.calls)
            self.deliver(message=message)
        return message

    def plain_message(self, message):
        message = message.message if isinstance(message, Call) else message
        return {name: value for name, value in message.items() if name != "reply_to_message"}

    def write(self, text, user=ALICE, thread=None, **fields):
        """Write a text message; `fields` are further fields of it (reply_to, quote, chat, forward_origin, ...)."""
        if text.startswith("/"):
            fields["entities"] = [{"type": "bot_command", "offset": 0, "length": len(text.split()[0])}]
        return self.post(user, thread, text=text, **fields)

    def edit(self, message, text=None, later=1):
        """Change the text (or the caption) of a message so many seconds after it was written; without a text deliver the
        update that comes for a reaction or a link preview."""
        part = "text" if "text" in message else "caption"
        edited = {**message, **({part: text} if text else {}), "edit_date": message["date"] + later}
        with self.changed:
            self.positions[message["chat"]["id"], message["message_id"]] = len(self.calls)
            self.deliver(edited_message=edited)
        return edited

    def buttons(self, message):
        """The buttons that a message of the bot's has now."""
        message = self.current(message)
        return [button for row in message.get("reply_markup", {}).get("inline_keyboard", []) for button in row]

    def current(self, message):
        """A message as it is now; `message` may be the call that sent it."""
        message = message.message if isinstance(message, Call) else message
        with self.changed:
            return dict(self.messages[message["chat"]["id"], message["message_id"]])

    def press(self, message, button=0, user=ALICE, data=None, inline=False):
        """Press a button, by its number or a part of its text; `data` is for a forged press, and `inline` for one of which
        the message is not told. Returns the query."""
        if data is None:
            data = self.find_button(message, button)["callback_data"]
        query = {"id": f"query{self.next_id()}", "from": user, "message": self.current(message),
                 "chat_instance": "1", "data": data}
        if inline:
            query["inline_message_id"] = str(query.pop("message")["message_id"])
        with self.changed:
            self.queries.add(query["id"])
            self.positions[query["id"]] = len(self.calls)
        self.deliver(callback_query=query)
        return query

    def find_button(self, message, wanted):
        buttons = self.buttons(message)
        if isinstance(wanted, int) and wanted < len(buttons):
            return buttons[wanted]
        for button in buttons:
            if isinstance(wanted, str) and wanted in button["text"]:
                return button
        raise AssertionError(f"no button {wanted!r} among {[button['text'] for button in buttons]}")

    def stop(self, draft):
        """Press the Stop button of a draft, given by the call that sent it."""
        stopped = {"chat": self.chats[draft.params["chat_id"]], "draft_id": draft.params["draft_id"]}
        if draft.thread is not None:
            stopped["message_thread_id"] = draft.thread
        return self.deliver(stopped_message_generation=stopped)

    def send_file(self, kind, data=b"data", name=None, size=None, mime=None,
                  sizes=((320, 240), (1280, 960)), **fields):
        """Send a photo, document, voice, audio, video, video_note, animation or sticker.

        `size` is what Telegram claims of it, `sizes` are those of a photo; `fields` are as for write().
        """
        if kind == "photo":
            return self.post(photo=[self.new_file(f"photo-{width}x{height}", data, size, width=width, height=height)
                                    for width, height in sizes], **fields)
        more = {"file_name": name} if name is not None else {}
        more.update({"mime_type": mime} if mime else {})
        if kind in ("voice", "audio", "video", "video_note", "animation"):
            more["duration"] = 3
        if kind == "sticker":
            more.update(type="regular", width=512, height=512, is_animated=False, is_video=False)
        if kind in ("video", "animation"):
            more.update(width=320, height=240)
        if kind == "video_note":
            more["length"] = 240
        content = {kind: self.new_file(kind, data, size, **more)}
        if kind == "animation":
            content["document"] = content["animation"]
        return self.post(**content, **fields)

    def album(self, *files, caption=None, **fields):
        """Send several files as one album: each a dict of send_file's arguments. The first has the caption."""
        group = f"album{self.next_id()}"
        captions = [{"caption": caption}] + [{}] * len(files) if caption else [{}] * len(files)
        return [self.send_file(**file, **text, **fields, media_group_id=group) for file, text in zip(files, captions)]

    def redeliver(self, message):
        """Deliver the update of a message once more, under its old id, whatever was acknowledged."""
        with self.changed:
            self.redelivered.append(self.update_of(message))
            self.changed.notify_all()

    def update_of(self, message):
        return next(update for update in self.sent_updates
                    if message in (update, update.get("message"), update.get("callback_query")))

    def is_acknowledged(self, message):
        """True when the bot has told that it has this message."""
        return self.update_of(message)["update_id"] < self.acknowledged

    # -- what the bot did

    def mark(self):
        """This moment, for `after`."""
        return len(self.calls)

    def position(self, after):
        if after is None or isinstance(after, int):
            return after or 0
        if isinstance(after, Call):
            return after.number + 1
        return self.positions[after["id"] if "data" in after else (after["chat"]["id"], after["message_id"])]

    def find(self, method=None, containing=None, thread=ANY, user=None, after=None, when=None, ok=True):
        """The calls of a method (or several; None: any lasting message), in order.

        `after`: a call, a message or a mark(). `ok`: True for those carried out, False for those refused, None for
        all that arrived. `when`: a function of the call.
        """
        methods = LASTING if method is None else (method,) if isinstance(method, str) else method
        with self.changed:
            return [call for call in self.calls[self.position(after):]
                    if call.method in methods
                    and (ok is None or call.ok is ok)
                    and (thread is ANY or call.thread == thread)
                    and (user is None or call.params.get("chat_id") == user["id"])
                    and (containing is None or containing in call.text)
                    and (when is None or when(call))]

    def wait_until(self, condition, timeout=20, what="the condition"):
        """Wait for `condition()` to be true, looking again after each call; returns what it returned."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not (result := condition()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise AssertionError(f"{what} did not happen in {timeout} s.\n{self.recent()}")
                self.changed.wait(min(remaining, 0.05))
            return result

    def wait_for(self, method=None, *, timeout=20, count=1, **which):
        """Wait for a call; returns it, or the `count`-th of them. See find() for which."""
        what = f"{method or 'a lasting message'} ({which})"
        return self.wait_until(lambda: self.find(method, **which)[count - 1:], timeout, what)[0]

    def answer(self, containing=None, thread=ANY, **which):
        """Wait for a lasting message; returns the call."""
        return self.wait_for(None, containing=containing, thread=thread, **which)

    def texts(self, thread=ANY, **which):
        """The lasting messages so far, as texts."""
        return [call.text for call in self.find(thread=thread, **which)]

    def drafts(self, thread=ANY, **which):
        return self.find(DRAFT, thread=thread, **which)

    def recent(self, count=15):
        polls = len([call for call in self.calls if call.method == "getUpdates"])
        calls = [str(call) for call in self.calls if call.method != "getUpdates"][-count:]
        return "\n".join([f"{polls} polls; the last {len(calls)} other calls:"] + calls)


def png(width=4, height=4):
    """A PNG image."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\x80" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------
# The harness: `python bot.py` as a process between the two
# ---------------------------------------------------------------------------------------------------------

REPO = Path(__file__).resolve().parent
PATH = os.environ["PATH"]  # which a test may change while bots start for others
KIRO_COMMAND = f"{shlex.quote(sys.executable)} -S -m {Path(__file__).stem} acp --agent-engine v2"


def wait_until(condition, timeout=20, what="the condition"):
    """Wait for `condition()` to be true; returns what it returned. For what announces nothing: processes, files."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what() if callable(what) else what}: not in {timeout} s")
        time.sleep(0.005)
    return result


def processes_of(folder):
    """The living processes whose control folder is this one, or in it: bots, agents, and what those have left."""
    mark, found = b"\0KIRO_STAND_IN=" + os.fsencode(folder) + b"/", set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            if mark in b"\0" + environ.read().replace(b"\0", b"/\0"):
                found.add(int(pid))
    return found


@contextlib.contextmanager
def watched(folder):
    """What is started inside, with control folders in this one, ends with us at the latest, also when we are killed."""
    with subprocess.Popen([sys.executable, __file__, "watch", str(folder)], stdin=subprocess.PIPE, start_new_session=True):
        yield


def watch(folder):
    """The process that sees to it: our stdin ends with whoever started us, however that came about."""
    sys.stdin.read()
    time.sleep(0.05)  # for what was just being started
    while left := processes_of(folder):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


class Nursery:
    """A process that has imported `bot.py` and forks into bots: that saves most of what it costs to start one."""

    def __init__(self, folder):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:  # the mark in the environment is for watched()
            environment = {**os.environ, "PYTHONPATH": str(REPO), "KIRO_STAND_IN": f"{folder}/nursery"}
            self.process = subprocess.Popen([sys.executable, "-m", Path(__file__).stem, "nursery"], stdin=theirs,
                                            start_new_session=True, cwd=folder, env=environment)
        self.requests = ours

    def bear(self, statements, arguments, cwd, environment, streams):
        """Start a bot; returns its process."""
        ours, theirs = socket.socketpair()
        with theirs:
            request = json.dumps([statements, arguments, str(cwd), environment]).encode()
            files = *(streams[name] for name in ("stdin", "stdout", "stderr")), theirs
            socket.send_fds(self.requests, [request], [file.fileno() for file in files])
        return Newborn(ours)

    def close(self):
        self.requests.close()
        self.process.wait()


class Newborn:
    """A bot that the nursery has started, to be handled like a Popen."""

    def __init__(self, news):
        self.news = news.makefile()  # a line with its pid, and one with its exit status
        news.close()
        self.pid, self.returncode = int(self.news.readline()), None

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("bot.py", timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self.news.readline()))
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def nursery():
    """The nursery's process: have a bot for each request, until there are no more."""
    import bot
    import gc
    import sessions
    gc.freeze()  # what is here already is looked at by nobody, and so need not be copied
    requests = socket.socket(fileno=os.dup(0))
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the nurses
    while (request := socket.recv_fds(requests, 10**6, 4))[0]:
        if not os.fork():
            return nurse(request, {"bot": bot, "sessions": sessions, "re": re})
        for descriptor in request[1]:
            os.close(descriptor)


def nurse(request, names):
    """Have one bot, tell its pid and then its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    statements, arguments, cwd, environment = json.loads(request[0])
    *streams, news = request[1]
    if pid := os.fork():
        os.write(news, b"%d\n" % pid)
        os.write(news, b"%d\n" % os.waitpid(pid, 0)[1])
        os._exit(0)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in request[1]:
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    exec(statements, names)
    names["bot"].start(arguments)


class RunningBot:
    """The bot in a folder of its own; settings are given as keywords and written to its `.env`."""

    nursery = None  # where bots come from; without one each is `python bot.py`
    path = str(REPO)  # where agents look for this file

    def __init__(self, folder, telegram, **settings):
        self.folder = Path(folder) / "bot"
        self.home = Path(folder) / "home"
        self.control = Path(folder) / "control"
        for path in (self.folder, self.home, self.control):
            path.mkdir(parents=True, exist_ok=True)
        self.telegram = telegram
        self.process = None
        self.failure = None  # of a test that ran ahead
        self.statements = ""
        self.others = set()  # processes of this folder that are neither the bot nor agents: run()
        self.frames, self.frames_read = [], 0
        self.log_path = Path(folder) / "log"
        self.log_path.touch()
        self.settings = {
            "BOT_TOKEN": TOKEN,
            "ALLOWED_TELEGRAM_IDS": f"{ALICE['id']},{BOB['id']}",
            "TELEGRAM_API_URL": telegram.url if telegram else "http://127.0.0.1:9",
            "KIRO_COMMAND": KIRO_COMMAND,
        }
        self.set(**settings)

    # -- running it

    def set(self, **settings):
        """Write `.env`; None takes a setting out."""
        self.settings.update(settings)
        lines = [f"{name}={value}\n" for name, value in self.settings.items() if value is not None]
        (self.folder / ".env").write_text("".join(lines))

    def environment(self):
        return {"PATH": PATH, "HOME": str(self.home), "LANG": "C.UTF-8", "PYTHONPATH": self.path,
                "KIRO_STAND_IN": str(self.control)}

    def command(self, *arguments):
        """The command line for what does not come from the nursery."""
        return [sys.executable, str(REPO / "bot.py"), *arguments]

    def hurry(self, **constants):
        """From now on run the bot with other constants, so that a test need not wait for the real ones; returns self."""
        return self.change("; ".join(f"(bot if hasattr(bot, {name!r}) else sessions).{name} = {value!r}"
                                     for name, value in constants.items()))

    def change(self, statements):
        """From now on run the bot after these statements, which may break it; returns self."""
        self.statements = statements
        return self

    def launch(self, arguments, stdin, stdout, stderr):
        """Start `bot.py`: as a process of its own, or sooner, by the nursery; returns it."""
        streams = dict(stdin=stdin, stdout=stdout, stderr=stderr)
        if self.nursery and "command" not in vars(self):
            return self.nursery.bear(self.statements, arguments, self.folder, self.environment(), streams)
        assert not self.statements, "only a bot from the nursery can be changed or hurried"
        return subprocess.Popen(self.command(*arguments), cwd=self.folder, env=self.environment(), **streams)

    def start(self, wait=True, **settings):
        """Start the bot, and wait until it polls."""
        self.set(**settings)
        before = self.telegram.mark()
        with open(self.log_path, "ab") as log, open(os.devnull, "rb") as nothing:
            self.process = self.launch([], nothing, log, log)
        if wait:
            self.telegram.wait_until(lambda: self.has_polled(before), 15, "the bot's first poll")
        return self

    def has_polled(self, mark):
        if self.process.poll() is not None:
            raise AssertionError(f"the bot ended with status {self.process.returncode}:\n{self.log()}")
        return self.telegram.find("getUpdates", after=mark, ok=None)

    def run(self, *arguments, input="", timeout=30, **settings):
        """Run `bot.py` with these arguments to its end; returns the CompletedProcess, with its output as text."""
        if settings:  # several may run at once, and read what would be written
            self.set(**settings)
        with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            stdin.write(input)
            stdin.seek(0)
            process = self.launch(arguments, stdin, stdout, stderr)
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
            said = [os.pread(file.fileno(), 10**6, 0).decode() for file in (stdout, stderr)]
        return subprocess.CompletedProcess(arguments, status, *said)

    def stop(self, timeout=15, by=signal.SIGTERM):
        """End the bot in the orderly way; returns the seconds that it took."""
        begun = time.monotonic()
        self.process.send_signal(by)
        self.ended(timeout)
        return time.monotonic() - begun

    def ended(self, timeout=15):
        """Wait for the bot to end; returns its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the bot did not end in {timeout} s:\n{self.log()}") from None

    def kill(self):
        """End the bot as a power failure would."""
        self.process.kill()
        self.process.wait()

    def restart(self, **settings):
        if self.running():
            self.stop()
        return self.start(**settings)

    def running(self):
        return self.process is not None and self.process.poll() is None

    def close(self):
        """Show the log, and end everything."""
        print(self.log())
        self.end()

    def end(self):
        """End everything, and look for what must not have been."""
        try:
            if self.running():
                self.stop()
            wait_until(lambda: not self.agents(), 5, lambda: f"the end of the agents {self.agents()}")
            self.check()
        finally:
            self.clean_up()

    def check(self):
        """No violations, no traceback, no warning of a library, and the token nowhere."""
        violations = [entry["frame"] for entry in self.wire("violation")]
        assert not self.telegram.violations + violations
        assert "Traceback" not in self.log()
        assert "deprecat" not in self.log().lower()
        assert TOKEN not in self.log()
        for entry in self.wire("start"):
            assert TOKEN not in json.dumps(entry["frame"])

    def clean_up(self):
        if self.running():
            self.kill()
        for pid in self.agents():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- looking at it

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_log(self, text, timeout=20):
        wait_until(lambda: text in self.log(), timeout, lambda: f"{text!r} in the log:\n{self.log()}")

    def database(self, query="SELECT * FROM sessions", *values):
        """The rows of a query as dicts."""
        with contextlib.closing(sqlite3.connect(f"file:{self.folder}/tg-acp.db?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, values)]

    def workspace(self, thread=0, user=ALICE):
        return self.folder / "workspaces" / str(user["id"]) / str(thread)

    def proc(self, name):
        return Path(f"/proc/{self.process.pid}") / name

    def status(self, name):
        """A number of /proc/PID/status, such as VmRSS (kB) or Threads."""
        return int(re.search(rf"^{name}:\s*(\d+)", self.proc("status").read_text(), re.MULTILINE)[1])

    def threads(self):
        return self.status("Threads")

    def rss(self):
        """Resident memory in MB."""
        return self.status("VmRSS") / 1024

    def fds(self):
        return len(list(self.proc("fd").iterdir()))

    def cpu(self):
        """Seconds of processor time so far, without children."""
        fields = self.proc("stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # -- its agents

    def habits(self, **habits):
        """Switch bad habits on (see Habits), those that were on before off; also starts counting `times` anew."""
        for claimed in self.control.glob("claimed.*"):
            claimed.unlink()
        new = self.control / "habits.new"
        new.write_text(json.dumps(habits))
        new.replace(self.control / "habits.json")

    def open_gate(self, name):
        """Let what waits for this gate go on."""
        (self.control / name).touch()

    def control_file(self, name, content):
        """Put a text where `!recite` finds it."""
        (self.control / name).write_text(content, encoding="utf-8", newline="")

    def agents(self):
        """The pids of all processes that descend from agents of this bot, also what `!spawn` left."""
        own = {self.process.pid} if self.process else set()
        return processes_of(self.control) - own

    def wait_agents(self, count, timeout=20):
        """Wait until exactly so many processes are there; returns their pids."""
        wait_until(lambda: len(self.agents()) == count, timeout, lambda: f"{count} agents rather than {self.agents()}")
        return self.agents()

    def wire(self, direction=None, method=None, pid=None, when=None):
        """The entries of the wire: dicts with pid, t, dir (in, out, start, exit, violation) and frame."""
        self.read_wire()
        return [entry for entry in self.frames
                if (direction is None or entry["dir"] == direction)
                and (method is None or isinstance(entry["frame"], dict) and entry["frame"].get("method") == method)
                and (pid is None or entry["pid"] == pid)
                and (when is None or when(entry))]

    def read_wire(self):
        """Take in the whole lines that were added since the last time."""
        with contextlib.suppress(FileNotFoundError), open(self.control / "wire.jsonl", "rb") as file:
            file.seek(self.frames_read)
            lines = file.read()
            whole = lines[:lines.rfind(b"\n") + 1]
            self.frames.extend(json.loads(line) for line in whole.splitlines())
            self.frames_read += len(whole)

    def wait_wire(self, direction="in", method=None, *, count=1, timeout=20, pid=None, when=None):
        """Wait for an entry of the wire; returns it, or the `count`-th of them."""
        return wait_until(lambda: self.wire(direction, method, pid, when)[count - 1:], timeout,
                          lambda: f"{direction} {method}, {count} times, on the wire; it has\n{self.recent_wire()}")[0]

    def recent_wire(self, count=15):
        return "\n".join(json.dumps(entry)[:300] for entry in self.wire()[-count:])

    def prompts(self):
        """The text of each prompt that agents got."""
        return ["\n".join(block.get("text", f"[{block['type']}]") for block in entry["frame"]["params"]["prompt"])
                for entry in self.wire("in", "session/prompt")]

    def wait_prompt(self, containing, timeout=20):
        """Wait for a prompt with this text; returns its entry of the wire."""
        return self.wait_wire("in", "session/prompt", timeout=timeout,
                              when=lambda entry: containing in json.dumps(entry["frame"], ensure_ascii=False))


class Typist:
    """A person at a terminal in which a program runs."""

    def __init__(self, command, **how):
        self.screen, terminal = pty.openpty()
        self.process = subprocess.Popen(["setsid", "--ctty", *command], stdin=terminal, stdout=terminal, stderr=terminal, **how)
        os.close(terminal)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, keys, until="> ", timeout=20):
        """Type this, and wait for a text on the screen; returns all that came up to it."""
        os.write(self.screen, keys.encode())
        shown, deadline = b"", time.monotonic() + timeout
        while until.encode() not in shown:
            if not select.select([self.screen], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise AssertionError(f"no {until!r} on the screen, but {shown.decode(errors='replace')!r}")
            shown += os.read(self.screen, 1)
        return shown.decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------

SLOW_AGENT = dict(start={"delay": 0.5}, new={"delay": 0.8}, load={"delay": 0.4})
ROUNDS = 15


def bench():
    """Measure the bot between the stand-ins, with an agent as slow as Kiro, and print the medians."""
    with tempfile.TemporaryDirectory() as folder, watched(folder), StandInTelegram() as telegram:
        bot = RunningBot(folder, telegram, MAX_PROCESSES=4)
        bot.habits(**SLOW_AGENT)
        bot.start()
        time.sleep(1)
        idle = bot.rss()
        rounds = [one_round(telegram, bot, n) for n in range(ROUNDS)]
        cold = [cold_start(telegram, bot, thread) for thread in range(100, 100 + ROUNDS // 3)]
        report("follow-up: update -> session/prompt", 10, [r["prompt"] for r in rounds], "ms")
        report("update -> first draft", 20, [r["draft"] for r in rounds] + [r["draft"] for r in cold], "ms")
        report("Kiro's response -> lasting answer", 30, [r["answer"] for r in rounds], "ms")
        report("cold: beyond Kiro's own start and load", 60, [r["prompt"] - 1300 for r in cold], "ms")
        report("resident memory, idle", 42, [idle], "MB")
        for chunks in (20_000, 40_000):
            report(f"processor time for {chunks} chunks", 0.8 * chunks / 20_000, [chunk_cost(telegram, bot, chunks)], "s")
        bot.kill()
    with tempfile.TemporaryDirectory() as folder, watched(folder), StandInTelegram() as telegram:
        thirty_topics(RunningBot(folder, telegram, WARM_SECONDS=2).start(), telegram)
    return 0


def report(what, at_most, values, unit):
    """Print one row of the table: the median, what it should be at most, and the worst."""
    print(f"{what:42} {statistics.median(values):8.2f} {unit}   at most {at_most:g}, worst {max(values):.2f}", flush=True)


def one_round(telegram, bot, n):
    """A follow-up in a topic whose next process is ready; returns milliseconds."""
    if n == 0:
        cold_start(telegram, bot, 7)
    loads = len(bot.wire("out", when=is_load_response))
    bot.wait_wire("out", when=is_load_response, count=n + 1)
    time.sleep(0.1)
    return timed(telegram, bot, f"round {n}, {loads} loads", 7)


def is_load_response(entry):
    """Is it the response that names the modes without a sessionId, as only that to session/load does?"""
    result = isinstance(entry["frame"], dict) and entry["frame"].get("result")
    return isinstance(result, dict) and "modes" in result and "sessionId" not in result


def cold_start(telegram, bot, thread):
    """The first message of a topic."""
    return timed(telegram, bot, f"cold {thread}", thread)


def timed(telegram, bot, text, thread):
    """Send a message; returns how long it took to the prompt, to the draft, and from Kiro's response to the answer."""
    begun, mark = time.monotonic(), telegram.mark()
    telegram.write(text, thread=thread)
    answer = telegram.wait_for("sendMessage", containing=f"echo: {text}", thread=thread, after=mark)
    draft = telegram.wait_for("sendMessageDraft", thread=thread, after=mark)
    prompt = bot.wait_prompt(text)
    response = bot.wait_wire("out", pid=prompt["pid"], when=lambda e: "stopReason" in str(e["frame"].get("result")))
    return {"prompt": 1000 * (prompt["t"] - begun), "draft": 1000 * (draft.time - begun),
            "answer": 1000 * (answer.time - response["t"])}


def chunk_cost(telegram, bot, chunks):
    """Seconds of processor time that the bot needs for an answer of so many chunks of nine bytes."""
    before, mark = bot.cpu(), telegram.mark()
    telegram.write(f"!chunks {chunks} 9\n!say the end", thread=7)
    telegram.wait_for(containing="the end", thread=7, after=mark, timeout=60)
    return bot.cpu() - before


def at_rest(bot):
    """Wait until the last warm process was given up; returns memory, threads and descriptors."""
    wait_until(lambda: bot.threads() <= 2, 60, lambda: f"rest: {bot.threads()} threads")
    time.sleep(0.5)
    return bot.rss(), bot.threads(), bot.fds()


def thirty_topics(bot, telegram):
    """Use thirty topics once, and see the bot go back to where it was."""
    telegram.write("warm up", thread=1)
    telegram.answer("echo: warm up", thread=1)
    before = at_rest(bot)
    for thread in range(2, 32):
        telegram.write("hello", thread=thread)
    for thread in range(2, 32):
        telegram.answer("echo: hello", thread=thread, timeout=60)
    after = at_rest(bot)
    print("thirty topics used once: memory {:.1f} -> {:.1f} MB, threads {} -> {}, descriptors {} -> {}".format(
        *(number for pair in zip(before, after) for number in pair)))
    bot.stop()


# ---------------------------------------------------------------------------------------------------------
# The load: many people at once
# ---------------------------------------------------------------------------------------------------------

QUICK_AGENT = r"""
while read -r line; do
    id=${line#*\"id\": }
    case $line in
        *'"method": "initialize"'*) result='{"protocolVersion": 1, "agentCapabilities": {"loadSession": true}}';;
        *'"method": "session/new"'*) result="{\"sessionId\": \"quick-$$\"}";;
        *'"method": "session/prompt"'*) result='{"stopReason": "end_turn"}'
            echo '{"method": "session/update", "params": {"update": {"sessionUpdate": "agent_message_chunk",' \
                 '"content": {"type": "text", "text": "At your service."}}}}';;
        *) result='{}';;
    esac
    echo "{\"jsonrpc\": \"2.0\", \"id\": ${id%%,*}, \"result\": $result}"
done
"""
PEOPLE, TOPICS_EACH = 50, 4


def load(count=5000):
    """Let everybody write the next message as soon as the last is answered, by an agent that does so at once."""
    with tempfile.TemporaryDirectory() as folder, watched(folder), StandInTelegram() as telegram:
        people = [{**ALICE, "id": 2000 + number} for number in range(PEOPLE)]
        (Path(folder) / "agent").write_text(QUICK_AGENT)
        bot = RunningBot(folder, telegram, KIRO_COMMAND=f"sh {folder}/agent", MAX_PROCESSES=8, WARM_SECONDS=0,
                  ALLOWED_TELEGRAM_IDS=",".join(str(person["id"]) for person in people), LOG_LEVEL="WARNING").start()
        try:
            at_start, begun, threads = bot.rss(), time.monotonic(), []
            for answered in answers(telegram, people, count):
                threads += [bot.threads()] if answered % 100 == 0 else []
            seconds, busy = time.monotonic() - begun, bot.cpu()
            print(f"{count} messages in {PEOPLE * TOPICS_EACH} topics: {count / seconds:.0f} a second, "
                  f"{1000 * busy / count:.1f} ms of processor time each; threads: at most {max(threads)}")
            after, left, _ = at_rest(bot)
            size = (bot.folder / "tg-acp.db").stat().st_size
            print(f"afterwards: memory {at_start:.1f} -> {after:.1f} MB, {left} threads, database {size / 2**20:.1f} MB")
            bot.stop()
        finally:
            bot.clean_up()


def answers(telegram, people, count):
    """Write `count` messages, one at a time in each topic; yields how many are answered, each time that one is."""
    topics = [(person, thread) for person in people for thread in range(1, TOPICS_EACH + 1)]
    to_write, names, position = iter(range(count)), {person["id"]: person for person in people}, telegram.mark()
    for person, thread in topics:
        telegram.write(f"message {next(to_write)}", user=person, thread=thread)
    for answered in range(1, count + 1):
        with telegram.changed:
            while not (call := next_answer(telegram, position)):
                assert telegram.changed.wait(30), f"only {answered} answers"
            position = call.number + 1
        if (number := next(to_write, None)) is not None:
            telegram.write(f"message {number}", user=names[call.params["chat_id"]], thread=call.thread)
        yield answered


def next_answer(telegram, position):
    """The first message with the agent's words from this call on, or None."""
    return next((call for call in telegram.calls[position:] if call.method == "sendMessage" and call.text == "At your service."), None)


# ---------------------------------------------------------------------------------------------------------
# The soak: kill -9 at random moments
# ---------------------------------------------------------------------------------------------------------


def kills(count=50, seed=None):
    """Kill a bot `count` times at random moments under load, and print what became of the messages."""
    seed = random.randrange(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory() as folder, watched(folder), StandInTelegram() as telegram:
        bot = RunningBot(folder, telegram, WARM_SECONDS=3)
        try:
            begun = time.monotonic()
            figures = Soak(bot, telegram, random.Random(seed)).run(count)
            print(f"{count} kills in {time.monotonic() - begun:.0f} s, seed {seed}")
            for name, value in figures.items():
                print(f"{value:6} {name}")
            bot.stop()
            bot.check()
        finally:
            bot.clean_up()


class Soak:
    """Load over several topics of two people, on a bot that is killed again and again."""

    TOPICS = [(ALICE, None), (ALICE, 7), (ALICE, 8), (BOB, None), (BOB, 7)]

    def __init__(self, bot, telegram, chance, longest=1):
        self.bot, self.telegram, self.chance = bot, telegram, chance
        self.longest = longest  # seconds between two kills
        self.marks = []  # one for each message: it is in its prompt, and in its answer
        self.ends = []  # when the bot was killed
        self.unconfirmed = set()  # the calls whose confirmation never left the server

    def run(self, count):
        self.telegram.fault("sendMessage", drop="after", times=None, when=self.cuts_off)
        for _ in range(count):
            self.bot.start(wait=self.chance.random() < 0.8)
            self.load_for(self.chance.uniform(0, self.longest))
            self.bot.kill()
            self.ends.append(time.monotonic())
        self.bot.start()
        wait_until(self.at_rest, 60, lambda: f"rest: {self.unrest()}")
        return self.figures()

    def cuts_off(self, call):
        if self.chance.random() < 0.05:
            self.unconfirmed.add(call.number)
        return call.number in self.unconfirmed

    def load_for(self, seconds):
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.write()
            time.sleep(min(self.chance.expovariate(8), left))

    def write(self):
        """A message of a random length of answer and of turn."""
        mark = f"<m{len(self.marks)}>"
        self.marks.append(mark)
        lines = [f"!say {mark}"]
        if self.chance.random() < 0.3:
            name = f"long{len(self.marks)}"
            self.bot.control_file(name, "".join(f"{mark} line {number} of a long answer\n" for number in range(300)))
            lines = [f"!recite {name} 500"]
        if self.chance.random() < 0.7:
            lines.insert(self.chance.randint(0, 1), f"!sleep {self.chance.uniform(0, 0.3):.3f}")
        user, thread = self.chance.choice(self.TOPICS)
        self.telegram.write("\n".join([mark, *lines]), user=user, thread=thread)

    def unrest(self):
        return self.bot.database("SELECT state, user_id, thread_id, body FROM inbox WHERE state NOT IN ('done', 'offered')")

    def at_rest(self):
        with self.telegram.changed:
            delivered = not self.telegram.pending
        return delivered and not self.unrest()

    def figures(self):
        sent = self.telegram.find(None)
        said = collections.Counter(mark for call in sent if "I was interrupted" not in call.text
                                   for mark in set(re.findall("<m[0-9]+>", call.text)))
        turns = self.bot.database("SELECT group_concat(body) AS bodies FROM inbox WHERE state = 'offered' GROUP BY turn_id")
        turns = [set(re.findall("<m[0-9]+>", turn["bodies"])) for turn in turns]
        offers = set().union(*turns)
        carded = {mark for call in sent if "I was interrupted" in call.text for mark in re.findall("<m[0-9]+>", call.text)}
        prompts = collections.Counter(mark for prompt in self.bot.prompts()
                                      for mark in set(re.findall("<m[0-9]+>", prompt)))
        repeated = self.repeated(sent)
        return {
            "messages sent": len(self.marks),
            "answered": len([mark for mark in self.marks if said[mark]]),
            "offered": len([mark for mark in self.marks if mark in offers]),
            "offered without a card": sum(len(turn) for turn in turns if not turn & carded),  # which names the first few
            "answered and offered": len([mark for mark in self.marks if said[mark] and mark in offers]),
            "lost": len([mark for mark in self.marks if not said[mark] and mark not in offers]),
            "run twice": len([mark for mark in self.marks if prompts[mark] > 1]),
            "parts sent": len(sent),
            "parts sent twice": len(repeated),
            "of these with their confirmation cut off": len([call for call in repeated if self.was_cut_off(call)]),
        }

    def repeated(self, sent):
        """The calls that were made once more later."""
        last = {(call.params["chat_id"], call.thread, call.text): call.number for call in sent}
        return [call for call in sent if call.number < last[call.params["chat_id"], call.thread, call.text]]

    def was_cut_off(self, call):
        """Was the confirmation dropped, or the bot killed before it could note it?"""
        return call.number in self.unconfirmed or any(0 <= end - call.time < 0.25 for end in self.ends)


if __name__ == "__main__":
    run, arguments = {"bench": bench, "load": load, "kills": kills, "watch": watch, "nursery": nursery}[sys.argv[1]], sys.argv[2:]
    raise SystemExit(run(*(arguments if run is watch else map(int, arguments))))

# ---------------------------------------------------------------------------------------------------------
# The tests: fixtures
# ---------------------------------------------------------------------------------------------------------

from concurrent.futures import ThreadPoolExecutor

import pytest

from bot import SettingsError, read_settings
from sessions import SessionRecord, SessionStore, StoreError
import bot as program


def bot_with(constants=None, **settings):
    """Decorates a test: its `bot` runs with these settings, and hurries with these constants (see RunningBot.hurry)."""
    def decorate(test):
        test.bot_with = constants or {}, settings
        return test
    return decorate


def ahead(test):
    """Decorates a test that mostly waits: it runs beside the tests before it, and its turn shows what came of that."""
    @functools.wraps(test)
    def outcome(telegram, bot, **_):
        if bot.failure:
            raise bot.failure
    outcome.ahead = test
    return outcome


class Spares:
    """The bots of the next few tests, started while the tests before them still run; and the tests that run ahead."""

    AHEAD = 12

    def __init__(self, folders, tests):
        folders.getbasetemp()  # made now, since two threads at once would both make it
        self.folders, self.pool, self.lane = folders, ThreadPoolExecutor(2), ThreadPoolExecutor(6)
        self.tests = [test for test in tests if "bot" in test.fixturenames]
        self.started = {test: self.lane.submit(self.live, test) for test in self.tests
                        if hasattr(test.function, "ahead")}  # test -> future (StandInTelegram, RunningBot)

    def start(self, test):
        constants, settings = getattr(test.function, "bot_with", ({}, {}))
        telegram = StandInTelegram()
        bot = RunningBot(self.folders.mktemp("bot"), telegram, **settings)
        bot.hurry(**constants)
        return telegram, bot.start()

    def live(self, test):
        """Run a whole test."""
        telegram, bot = self.start(test)
        try:
            test.function.ahead(telegram, bot, **(test.callspec.params if hasattr(test, "callspec") else {}))
            bot.end()
        except BaseException as failure:  # to be raised when it is this test's turn
            bot.failure = failure
            bot.clean_up()
        return telegram, bot

    def take(self, test):
        position = self.tests.index(test)
        for each in self.tests[position:position + 1 + self.AHEAD]:
            if each not in self.started:
                self.started[each] = self.pool.submit(self.start, each)
        return self.started.pop(test).result()

    def close(self):
        self.lane.shutdown(cancel_futures=True)
        for future in self.started.values():
            if not future.cancelled():
                telegram, bot = future.result()
                with telegram:
                    bot.close()


def stand_in_alone(folder):
    """Put into this folder what agents need of this file, which saves a quarter of what it costs to start one."""
    code, _, _ = Path(__file__).read_text().partition("# The stand-in Telegram: what it keeps")
    (folder / Path(__file__).name).write_text(code)
    return folder


@pytest.fixture(scope="session", autouse=True)
def orderly_run(tmp_path_factory):
    """Nothing outlives the run; and what it starts hears SIGINT, also where a shell has put the run into the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # children would inherit that, but not a handler
        signal.signal(signal.SIGINT, lambda *_: None)
    with watched(tmp_path_factory.getbasetemp()):
        RunningBot.nursery = Nursery(tmp_path_factory.getbasetemp())
        RunningBot.path = f"{stand_in_alone(tmp_path_factory.mktemp('stand-in'))}:{REPO}"
        yield
        RunningBot.nursery.close()


@pytest.fixture(scope="session")
def spares(request, tmp_path_factory):
    spares = Spares(tmp_path_factory, request.session.items)
    yield spares
    spares.close()


def wanted(request):
    """The tests that ask for this fixture: it is autouse, because what it starts needs time, and those come late."""
    return [item for item in request.session.items if request.fixturename in inspect.signature(item.function).parameters]


@pytest.fixture
def spare(request):
    """(StandInTelegram, a running bot) for tests that want a bot, else None."""
    return request.getfixturevalue("spares").take(request.node) if "bot" in request.fixturenames else None


@pytest.fixture
def telegram(spare):
    with spare[0] if spare else StandInTelegram() as telegram:
        yield telegram


@pytest.fixture
def make_bot(tmp_path, telegram):
    """Makes bots that are not started yet: make_bot(**settings)."""
    bots = []

    def make(folder="", **settings):
        bots.append(RunningBot(tmp_path / folder, telegram, **settings))
        return bots[-1]

    yield make
    for bot in bots:
        bot.close()


@pytest.fixture
def bot(spare):
    """A running bot, with the usual settings unless the test is decorated otherwise."""
    _, bot = spare
    yield bot
    bot.close()


# ---------------------------------------------------------------------------------------------------------
# The tests: the store and the settings
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    with SessionStore(db_path=str(tmp_path / "tg-acp.db")) as store:
        yield store


def rows(store_path):
    """The table of sessions, as it is on disk."""
    with contextlib.closing(sqlite3.connect(store_path)) as connection:
        return connection.execute("SELECT * FROM sessions").fetchall()


def test_the_table_of_sessions_is_the_owners(store, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "tg-acp.db")) as connection:
        columns = [column[1:] for column in connection.execute("PRAGMA table_info(sessions)")]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert columns == [("user_id", "INTEGER", 1, None, 1), ("thread_id", "INTEGER", 1, None, 2),
                       ("session_id", "TEXT", 1, None, 0), ("workspace_path", "TEXT", 1, None, 0),
                       ("model", "TEXT", 1, "'auto'", 0), ("created_at", "TEXT", 1, None, 0),
                       ("updated_at", "TEXT", 1, None, 0)]


def test_a_session_belongs_to_one_user_and_thread(store):
    store.set_model(1, 2, "claude")
    assert store.get_session(user_id=1, thread_id=2) is None and store.get_model(1, 2) == "auto"
    store.upsert_session(user_id=1, thread_id=2, session_id="s", workspace_path="/w")
    assert store.get_session(1, 2) == SessionRecord(user_id=1, thread_id=2, session_id="s", workspace_path="/w")
    assert store.get_session(2, 1) is store.get_session(1, 1) is None
    store.delete_session(user_id=1, thread_id=2)
    assert store.get_session(1, 2) is None


def test_a_new_session_keeps_created_at_and_starts_at_auto(store, tmp_path):
    store.upsert_session(1, 2, "old", "/old")
    store.set_model(user_id=1, thread_id=2, model="claude")
    assert store.get_model(user_id=1, thread_id=2) == "claude"
    [(*_, created, updated)] = rows(tmp_path / "tg-acp.db")
    assert created == updated and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", created)
    store.upsert_session(1, 2, "new", "/new")
    [(*record, again, later)] = rows(tmp_path / "tg-acp.db")
    assert record == [1, 2, "new", "/new", "auto"] and again == created and later > updated
    store.set_model(1, 2, "claude")
    store.upsert_session(1, 2, "newer", "/new", keep_model=True)
    assert store.get_session(1, 2) == (1, 2, "newer", "/new", "claude")


def test_a_session_of_an_earlier_version_may_have_a_history(tmp_path):
    path = tmp_path / "tg-acp.db"
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.execute("CREATE TABLE session_facts (session_id TEXT PRIMARY KEY, ended INTEGER NOT NULL DEFAULT 0, "
                    "taught INTEGER NOT NULL DEFAULT 0)")
        old.execute("INSERT INTO session_facts VALUES ('known', 0, 1)")
        old.commit()
    for _ in range(2):
        with SessionStore(str(path)) as store:
            store.upsert_session(1, 7, "new", "/w")
            assert store.get_facts("unknown") == (True, False, False) and store.get_facts("new") == (False, False, False)
            assert store.get_facts("known") == (True, False, False)
    with SessionStore(str(path)) as store:
        store.set_facts("new", ended=True, taught=True, in_sight=True)
        store.upsert_session(1, 7, "new", "/elsewhere")
        assert store.get_facts("new") == (True, True, True)
        store.set_note("a", "1"), store.set_note("a", "2")
        assert (store.get_note("a"), store.get_note("b")) == ("2", "")


def test_a_store_is_closed_at_the_end_of_its_block(tmp_path):
    with SessionStore(str(tmp_path / "db")) as store:
        store.upsert_session(1, 2, "s", "/w")
    with pytest.raises(StoreError, match="closed"):
        store.get_session(1, 2)
    with SessionStore(str(tmp_path / "db")) as store:
        assert store.get_session(1, 2).session_id == "s"


def test_many_threads_use_a_store_at_once(store):
    def use(user):
        for thread in range(10):
            store.upsert_session(user, thread, f"{user}/{thread}", "/w")
            store.set_model(user, thread, f"model {user}")
            assert store.get_session(user, thread) == (user, thread, f"{user}/{thread}", "/w", f"model {user}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert len(store.session_ids()) == 80


GOOD = {"BOT_TOKEN": TOKEN}


@pytest.mark.parametrize("name, value", [
    ("BOT_TOKEN", "secret"),
    ("ALLOWED_TELEGRAM_IDS", "1001,@alice"), ("ALLOWED_TELEGRAM_IDS", "1001;1002"), ("ALLOWED_TELEGRAM_IDS", "-5"),
    ("KIRO_COMMAND", 'kiro "acp'),
    ("ALLOWED_FOLDERS", "~/src, work"), ("ALLOWED_FOLDERS", "~nobody-here"),
    ("MAX_PROCESSES", "0"), ("MAX_PROCESSES", "2.5"), ("START_SECONDS", "0"), ("WORKSPACE_BASE_PATH", "~no.such.user/x"),
    ("WARM_SECONDS", "-1"), ("WARM_SECONDS", "nan"),
    ("TOOL_APPROVAL", "maybe"),
    ("SILENCE_SECONDS", "soon"), ("SILENCE_SECONDS", "0"),
    ("RICH_MESSAGES", "2"),
    ("LOG_LEVEL", "LOUD"),
    ("TELEGRAM_API_URL", "ftp://x"), ("TELEGRAM_API_URL", "http://"),
])
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(SettingsError, match=rf"\A{name}\b[^\n]*\Z"):
        read_settings({**GOOD, name: value})


def test_settings_have_their_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = read_settings(GOOD)
    assert settings.kiro_command == ["kiro-cli", "acp", "--agent-engine", "v2"]
    assert (settings.allowed, settings.max_processes, settings.warm_seconds) == (frozenset(), 3, 300)
    assert (settings.ask_permission, settings.silence_seconds, settings.rich_messages) == (True, 600, True)
    assert (settings.log_level, settings.api_url) == ("INFO", "https://api.telegram.org")
    assert settings.workspaces == tmp_path.resolve() / "workspaces" and settings.start_seconds == 60
    assert read_settings({**GOOD, "ALLOWED_TELEGRAM_IDS": " 1001 1002,\t1003 "}).allowed == {1001, 1002, 1003}


BAD_SETTINGS = [("BOT_TOKEN", ""), ("ALLOWED_TELEGRAM_IDS", "1001;1002"), ("WORKSPACE_BASE_PATH", "/dev/null/x"),
                ("WARM_SECONDS", "inf"), ("BOT_TOKEN", "123456:NotTheStandInsToken"),
                ("WORKSPACE_BASE_PATH", "~no.such.user/x"),
                ("HTTP_PROXY", "socks5://127.0.0.1:9"), ("ALL_PROXY", "http://me:secret@nowhere:port"),
                ("TELEGRAM_API_URL", "http://127.0.0.1:99999")]


def said_by(bot):
    """What a bot said, but for what it found."""
    return [line for line in bot.log().splitlines() if " INFO " not in line]


def test_a_bad_setting_is_one_line_that_names_it(make_bot):
    def attempt(number, name, value):
        return make_bot(f"bad{number}", **{name: value}).start(wait=False)
    attempts = [(name, value, attempt(number, name, value)) for number, (name, value) in enumerate(BAD_SETTINGS)]
    for name, value, bot in attempts:
        status, said = bot.ended(20), said_by(bot)
        assert (status, len(said)) == (2, 1) and name in said[0], (name, value, said)
        assert "secret" not in said[0]


def test_a_setting_that_is_misspelt_is_named(telegram, make_bot):
    bot = make_bot(ALLOWED_TELEGRAM_ID="1001", KIRO_API_KEY="x", TELEGRAM_API_ID="1").start()
    warnings = [line for line in bot.log().splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "ALLOWED_TELEGRAM_ID is no setting; is ALLOWED_TELEGRAM_IDS meant?" in warnings[0]


def test_a_line_of_the_settings_that_cannot_be_read_is_told(make_bot):
    bot = make_bot(ALLOWED_TELEGRAM_IDS='"1001').start(wait=False)
    status, said = bot.ended(20), said_by(bot)
    assert status == 2 and len(said) == 1 and ".env" in said[0], said


# ---------------------------------------------------------------------------------------------------------
# The tests: a session
# ---------------------------------------------------------------------------------------------------------


def ask(telegram, text, thread=7, user=ALICE):
    """Write a message and wait for its answer; returns the answer's text."""
    message = telegram.write(text, thread=thread, user=user)
    return telegram.answer(thread=thread, user=user, after=message).text


def states(bot):
    """How far the messages are, in order of arrival."""
    return [row["state"] for row in bot.database("SELECT state FROM inbox ORDER BY id")]


def settle(bot):
    """Wait until all messages are done."""
    wait_until(lambda: set(states(bot)) == {"done"}, what="the end of all turns")


def row_of(bot, thread=7, user=ALICE):
    """The topic's row in the table of sessions."""
    [row] = bot.database("SELECT * FROM sessions WHERE user_id = ? AND thread_id = ?", user["id"], thread)
    return row


def sent(bot, method):
    """The parameters of each such request that agents got."""
    return [entry["frame"]["params"] for entry in bot.wire("in", method)]


@ahead
def test_every_topic_of_every_user_has_its_own_session_and_folder(telegram, bot):
    for thread, user in ((7, ALICE), (8, ALICE), (7, BOB), (None, BOB)):
        assert ask(telegram, f"hello from {thread}", thread, user=user) == f"echo: hello from {thread}"
        folder, row = bot.workspace(thread or 0, user), row_of(bot, thread or 0, user)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert sent(bot, "session/new")[-1] == {"cwd": str(folder), "mcpServers": []}
        assert (row["workspace_path"], row["model"]) == (str(folder), "auto")
        assert row["session_id"] == sent(bot, "session/prompt")[-1]["sessionId"]
    assert len({row["session_id"] for row in bot.database()}) == 4
    recalled = ask(telegram, "!recall", 7)
    assert "hello from 7" in recalled and "hello from 8" not in recalled
    assert {entry["frame"]["cwd"] for entry in bot.wire("start")} == {row["workspace_path"] for row in bot.database()}


@pytest.mark.parametrize("replay", ["before", "after"])
@bot_with(WARM_SECONDS=0)
@ahead
def test_a_restart_remembers(telegram, bot, replay):
    bot.habits(replay=replay, forget_model=True)
    ask(telegram, "first")
    ask(telegram, "/model claude-haiku-4.5")
    ask(telegram, "second")
    settle(bot)
    bot.restart()
    recalled = ask(telegram, "!recall")
    assert "first" in recalled and "second" in recalled
    assert ask(telegram, "!model") == "model: claude-haiku-4.5"
    session = row_of(bot)["session_id"]
    assert sent(bot, "session/load") == 3 * [{"sessionId": session, "cwd": str(bot.workspace(7)), "mcpServers": []}]
    assert sent(bot, "session/set_model") == 3 * [{"sessionId": session, "modelId": "claude-haiku-4.5"}]
    assert len({entry["pid"] for entry in bot.wire("in", "session/prompt")}) == 4
    assert not telegram.find((*LASTING, DRAFT), when=lambda call: call.text.count("echo:") > 1)


@ahead
def test_new_begins_a_session_in_its_place_of_the_queue(telegram, bot):
    telegram.write("!wait go", thread=7)
    telegram.write("/model claude-sonnet-4", thread=7)
    bot.wait_prompt("!wait go")
    old = row_of(bot)
    with telegram.batch_of_updates():
        for text in ("before", "/new", "!recall"):
            telegram.write(text, thread=7)
    bot.open_gate("go")
    telegram.answer("0 before", thread=7)
    [first, _, new] = [answer for answer in telegram.texts(7) if "Model for this topic" not in answer][-3:]
    assert (first, new) == ("echo: before", "0 before: ")
    row = row_of(bot)
    assert row["session_id"] != old["session_id"] and row["created_at"] == old["created_at"]
    assert (row["model"], row["workspace_path"]) == ("claude-sonnet-4", old["workspace_path"])


@bot_with(dict(FRAME_SECONDS=0.02))
@ahead
def test_the_bot_tells_what_it_is_and_where_it_stands(telegram, bot):
    assert ask(telegram, "/start") == ask(telegram, "/help") and "/new" in telegram.texts()[-1]
    assert "none yet" in ask(telegram, "/status")
    assert "finished without" in ask(telegram, "!context 42.4\n!credits 0.5 0.25")
    session = row_of(bot)["session_id"]
    telegram.write("!say x\n!wait go", thread=7)
    bot.wait_prompt("!wait go")
    waiting = telegram.write("more", thread=7)
    status = ask(telegram, "/status")
    for told in (session, "Model: auto", f"Folder: {bot.workspace(7)}", "42 %", "Credits: 0.75 in the last turn", "Waiting: more"):
        assert told in status
    telegram.wait_for(DRAFT, containing="x", after=telegram.find(containing="Waiting: more")[0])
    bot.open_gate("go")
    telegram.answer("echo: more", after=waiting)
    settle(bot)
    assert "Nothing is running" in ask(telegram, "/status")
    assert {command["command"] for command in telegram.commands} == {"new", "stop", "model", "folder", "sessions", "status", "get",
                                                                       "help"}


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: drafts and Stop
# ---------------------------------------------------------------------------------------------------------


QUICK = dict(FRAME_SECONDS=0.02, KEEP_ALIVE_SECONDS=0.1)  # many frames


def press_stop(telegram, draft):
    telegram.stop(draft)


def write_stop(telegram, draft):
    telegram.write("/stop", thread=draft.thread)


STOPS = [(7, press_stop), (8, write_stop)]


@bot_with(QUICK)
def test_a_draft_appears_at_once_and_grows(telegram, bot):
    begun = time.monotonic()
    telegram.write("!say one\n!wait go\n!say two\n!wait on", thread=7)
    first = telegram.wait_for(DRAFT)
    assert first.time - begun < 0.9
    assert (first.text, first.thread, first.params["can_stop"]) == ("Thinking…", 7, True)
    telegram.wait_for(DRAFT, containing="one")
    bot.open_gate("go")
    telegram.wait_for(DRAFT, containing="onetwo")
    bot.open_gate("on")
    answer = telegram.answer("onetwo", thread=7)
    assert {draft.params["draft_id"] for draft in telegram.drafts(7)} == {first.params["draft_id"]}
    ask(telegram, "next")
    assert telegram.drafts(7, after=answer)[0].params["draft_id"] != first.params["draft_id"]


@bot_with(dict(FRAME_SECONDS=0.6))
def test_all_topics_of_a_chat_share_one_pace(telegram, bot):
    for thread in (7, 8):
        telegram.write("!chunks 16 50 0.05", thread=thread)
    for thread in (7, 8):
        telegram.answer("00015", thread=thread)
    drafts = telegram.drafts()
    firsts = {draft.params["draft_id"]: draft for draft in reversed(drafts)}.values()
    paced = [draft for draft in drafts if draft not in firsts]
    gaps = [draft.time - drafts[drafts.index(draft) - 1].time for draft in paced]
    assert paced and min(gaps) > 0.3  # of 0.6, since the earlier one may arrive late


@bot_with(QUICK)
@ahead
def test_no_frame_of_a_turn_comes_after_its_answer(telegram, bot):
    scripts = ["!chunks 20 50", "!tool execute Running: make\n!say done", "!say half\n!kill", "!say half\n!silence"]
    for thread, script in enumerate(scripts, 1):
        telegram.write(script, thread=thread)
    telegram.stop(telegram.wait_for(DRAFT, containing="half", thread=4))
    answers = [telegram.answer(thread=thread) for thread in range(1, 5)]
    goes_on(telegram, 1, 2, 3, 4)  # which takes several times as long as a frame may be old
    for answer in answers:
        first, *_ = drafts = telegram.drafts(answer.thread)
        last = [draft for draft in drafts if draft.params["draft_id"] == first.params["draft_id"]][-1]
        assert last.number < answer.number, f"{last} after {answer}"


@bot_with(QUICK)
def test_what_kiro_says_after_the_end_of_a_turn_is_no_part_of_the_answer(telegram, bot):
    telegram.write("!say mine\n!wait go\n!late not mine\n!late_ask", thread=7)
    telegram.wait_for(DRAFT, containing="mine")
    stuck = telegram.fault(DRAFT, hang=10)  # so that the bot meets the end and what follows it at once
    telegram.wait_until(lambda: stuck.hits)
    bot.open_gate("go")
    bot.wait_wire("in", when=lambda entry: "cancelled" in str(entry["frame"].get("result")))
    stuck.end()
    assert telegram.answer(thread=7).text == "mine"


@bot_with(QUICK)
@ahead
def test_a_draft_is_kept_alive_and_shows_the_tail_and_the_tool(telegram, bot):
    telegram.write("!chunks 90 100\n!tool execute Running: make\n!wait go", thread=7)
    draft = telegram.wait_for(DRAFT, containing="make", count=4)
    assert f"{89:099d}" in draft.text and f"{0:099d}" not in draft.text
    bot.open_gate("go")
    telegram.answer(f"{89:099d}", thread=7)
    last = telegram.answer(f"{89:099d}", thread=7)
    assert not telegram.drafts(after=last)


@bot_with({**QUICK, "TYPING_SECONDS": 0.15})
@ahead
def test_a_server_without_drafts_is_asked_once_and_shows_that_kiro_types(telegram, bot):
    telegram.fault(DRAFT, status=500)
    lacking = telegram.fault(DRAFT, status=404, description="Not Found: method not found", times=None)
    telegram.write("!chunks 20 30 0.02\n!wait gate\n!say done", thread=7)
    signs = [telegram.wait_for("sendChatAction", thread=7, count=count) for count in (1, 2, 3, 4)]
    bot.open_gate("gate")
    telegram.answer("done", thread=7)
    assert lacking.hits == 1
    assert signs[-1].time - signs[0].time >= 0.3  # of 0.45, since the first may arrive late


@bot_with(QUICK)
@ahead
def test_stop_ends_a_running_turn_and_keeps_what_was_said(telegram, bot):
    for thread, stop in STOPS:
        telegram.write("!say so far\n!silence", thread=thread)
        stop(telegram, telegram.wait_for(DRAFT, containing="so far", thread=thread))
        answer = telegram.answer("so far", thread=thread)
        assert answer.text.startswith("so far\n") and "Stopped" in answer.text
        tell(telegram, "go on", thread, "ℹ️ Kiro kept nothing of what was said here", "echo: go on")
    assert len(bot.wire("in", "session/cancel")) == 2
    assert "Nothing is running" in ask(telegram, "/stop")


def test_stop_ends_a_turn_that_is_starting(telegram, bot):
    bot.habits(new={"gate": "open"})
    for thread, stop in STOPS:
        telegram.write("never", thread=thread)
        bot.wait_wire("in", "session/new", count=thread - 6)
        stop(telegram, telegram.wait_for(DRAFT, thread=thread))
        assert "Stopped" in telegram.answer(thread=thread).text
    bot.open_gate("open")
    assert ask(telegram, "!recall").startswith("0 before")
    assert not any("never" in prompt for prompt in bot.prompts())


@bot_with(MAX_PROCESSES=1)
@ahead
def test_stop_ends_a_turn_that_waits_for_a_place(telegram, bot):
    telegram.write("!wait go", thread=6)
    bot.wait_prompt("!wait go")
    for thread, stop in STOPS:
        telegram.write("never", thread=thread)
        stop(telegram, telegram.wait_for(DRAFT, thread=thread, containing="Waiting for a free place"))
        assert "Stopped" in telegram.answer(thread=thread).text
    bot.open_gate("go")
    telegram.answer(thread=6)
    assert ask(telegram, "now", 8) == "echo: now"
    assert len(bot.prompts()) == 2


@bot_with(MAX_PROCESSES=1, WARM_SECONDS=0)
def test_a_place_that_comes_free_at_the_moment_of_a_stop_goes_to_the_next(telegram, bot):
    telegram.write("!wait go", thread=6)
    bot.wait_prompt("!wait go")
    stuck = telegram.fault(DRAFT, hang=10, when=lambda call: call.thread == 7)  # so that both reach the turn at once
    telegram.write("never", thread=7)
    telegram.wait_until(lambda: stuck.hits)
    bot.open_gate("go")
    telegram.answer(thread=6)
    bot.wait_agents(0)
    stop = telegram.write("/stop", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(stop))
    stuck.end()
    assert "Stopped" in telegram.answer(thread=7).text
    goes_on(telegram, 8)


def test_a_stop_means_what_was_there_and_not_what_comes_after(telegram, bot):
    stuck = telegram.fault(DRAFT, hang=10)  # so that the turn does not meet the stop before all three are there
    wrong = telegram.write("wrong", thread=7)
    telegram.wait_until(lambda: stuck.hits)
    with telegram.batch_of_updates():
        telegram.write("/stop", thread=7)
        right = telegram.write("right", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(right))
    stuck.end()
    stopped = telegram.answer("⏹ Stopped before Kiro began.", thread=7, after=wrong)
    telegram.answer("echo: right", thread=7)
    assert len(bot.prompts()) == 1
    telegram.press(stopped, "Ask again")
    telegram.answer("echo: wrong", thread=7)


def test_a_stop_counts_before_the_topic_comes_to_its_message(telegram, bot):
    unconfirmed = telegram.fault("sendMessage", hang=10, times=None, when=lambda call: call.text == "former")
    telegram.write("!say former", thread=7)
    telegram.wait_until(lambda: unconfirmed.hits)
    bot.kill()
    bot.start()
    telegram.wait_until(lambda: unconfirmed.hits == 2)
    for text in ("never", "/stop"):
        message = telegram.write(text, thread=7)
        telegram.wait_until(lambda: telegram.is_acknowledged(message))
    unconfirmed.end()
    telegram.answer("⏹ Stopped before Kiro began", thread=7)
    goes_on(telegram, 7)
    assert not any("never" in prompt for prompt in bot.prompts())


@bot_with(QUICK)
def test_the_button_of_an_older_draft_does_nothing(telegram, bot):
    ask(telegram, "first")
    old = telegram.drafts(7)[0]
    telegram.write("!say still here\n!wait go", thread=7)
    telegram.wait_for(DRAFT, containing="still here")
    press = telegram.stop(old)
    telegram.wait_until(lambda: telegram.is_acknowledged(press))
    bot.open_gate("go")
    assert telegram.answer("still here").text == "still here"
    assert not bot.wire("in", "session/cancel")


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: the journal, the queue, many topics
# ---------------------------------------------------------------------------------------------------------


def test_the_journal_knows_how_far_each_message_is(telegram, bot):
    telegram.write("!say said\n!wait go", thread=7)
    bot.wait_prompt("!wait go")
    assert states(bot) == ["begun"]
    second = telegram.write("second", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(second))
    assert states(bot) == ["begun", "waiting"]
    unconfirmed = telegram.fault("sendMessage", hang=10)
    bot.open_gate("go")
    telegram.answer("said")
    assert states(bot) == ["answered", "waiting"]
    unconfirmed.end()
    telegram.answer("echo: second")
    settle(bot)


def test_a_message_that_cannot_be_journaled_is_not_acknowledged(telegram, bot):
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON inbox BEGIN SELECT RAISE(FAIL, 'disk full'); END")
        message = telegram.write("hello", thread=7)
        telegram.answer("can't store", thread=7)
        assert not telegram.is_acknowledged(message)
        other.execute("DROP TRIGGER full")
    bot.restart()
    telegram.answer("echo: hello", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(message))


@bot_with(dict(TIME_SHOWN_AFTER=0, FRAME_SECONDS=0.05))
def test_the_draft_and_status_say_where_the_turn_is(telegram, bot):
    plan = "[x] Read, [>] Write the tests, [ ] Mend"
    telegram.write(f"!tool read a.txt\n!tool_done\n!plan {plan}\n!tool execute Running: npm test\n!wait go\n!say ok", thread=7)
    where = "🔧 Running: npm test · step 2 · 1/3 Write the tests · 0 s"
    telegram.wait_for(DRAFT, containing=where, thread=7)
    status = ask(telegram, "/status")
    assert status.startswith(where[:-3]) and "\n☑ Read\n▸ Write the tests\n☐ Mend\nModel: " in status
    bot.open_gate("go")
    telegram.answer("ok", thread=7)
    settle(bot)
    script = {"sessionUpdate": "tool_call", "toolCallId": "t1", "title": f"Running: cat <<EOF\n\u202e{'x' * 10_000}\nEOF"}
    telegram.write(f"!say Now\n{update(script)}!wait on", thread=7)
    where = "🔧 Running: cat <<EOF \\u202e" + "x" * 123 + "… · "
    assert telegram.wait_for(DRAFT, containing="🔧 Running: cat", thread=7).text.startswith(f"Now\n\n{where}")
    assert ask(telegram, "/status").startswith(where)
    bot.open_gate("on")
    settle(bot)
    assert "in the last turn, 0.0" in ask(telegram, "/status") and "/compact – Summarize" in ask(telegram, "/help")


def test_times_and_lines_are_short(telegram):
    assert [program.duration(s) for s in (0.4, 59.9, 95, 7500)] == ["0 s", "59 s", "1 m 35 s", "2 h 5 m"]
    assert program.one_line(" a\n\u202eb " + "c" * 99, 11) == "a \\u202eb c…"


@ahead
def test_what_arrives_during_a_turn_goes_in_order_and_commands_alone(telegram, bot):
    telegram.write("!wait go", thread=7)
    bot.wait_prompt("!wait go")
    texts = ["one", "two", "three", "/compact  all of\nit", "/agent@kiro_test_bot swap", "four", "five"]
    messages = [telegram.write(text, thread=7) for text in texts]
    telegram.edit(messages[1], "TWO")
    telegram.wait_for("setMessageReaction")
    assert "Waiting: TWO\nWaiting: three\nWaiting: /compact all of it\n" in ask(telegram, "/status")
    bot.open_gate("go")
    telegram.answer("echo: four")
    assert telegram.texts(7)[2:] == ["echo: one\n\nTWO\n\nthree", "The conversation was compacted.", "echo: /agent swap",
                                     "echo: four\n\nfive"]
    _, first, *commands, last = bot.prompts()
    assert first.startswith("one\n\nTWO\n\nthree") and last.startswith("four\n\nfive")
    assert commands == ["/compact  all of\nit", "/agent swap"]
    [reaction] = telegram.find("setMessageReaction")
    assert reaction.params["message_id"] == messages[0]["message_id"]


@ahead
def test_what_went_as_edited_is_not_run_again_at_the_next_start(telegram, bot):
    telegram.write("!wait go", thread=7)
    bot.wait_prompt("!wait go")
    telegram.edit(telegram.write("wrong", thread=7), "right")
    telegram.wait_until(lambda: telegram.acknowledged > telegram.last_update_id)
    bot.open_gate("go")
    telegram.answer("echo: right", thread=7)
    bot.restart()
    assert ask(telegram, "next") == "echo: next" and len(bot.prompts()) == 3


@ahead
def test_what_waits_can_be_taken_back(telegram, bot):
    telegram.write("!wait gate\n!say first", thread=7)
    bot.wait_prompt("!wait gate")
    with telegram.batch_of_updates():
        for n in range(1000):
            telegram.write(f"message {n} \u202e" + "x" * 100 if n else "message\n0", thread=7)
    wait_until(lambda: len(states(bot)) == 1001, what="all messages", timeout=20)
    telegram.write("/status", thread=7)
    status = telegram.answer("and 992 more", thread=7)
    shown = ["message 0", *(f"message {n} \\u202e" + "x" * 24 + "…" for n in range(1, 8))]
    assert status.text.splitlines()[1:9] == [f"Waiting: {text}" for text in shown]
    assert offers(telegram, status) == [f"Remove: {text}" for text in shown]
    for said in ("Removed.", "This is over."):
        assert command(telegram, (status, "message 1")).text == said
    data = telegram.buttons(status)[0]["callback_data"]
    telegram.press(status, user=BOB, data=data)
    bot.open_gate("gate")
    prompt = bot.wait_prompt("message 2 ")["frame"]["params"]["prompt"][0]["text"]
    assert "message 1 " not in prompt and "message 2 " in prompt
    settle(bot)


@bot_with(MAX_PROCESSES=1)
def test_a_command_behind_a_message_that_was_taken_back_is_still_one(telegram, bot):
    telegram.write("!wait gate\n!say first", thread=8)
    bot.wait_prompt("!wait gate")
    telegram.write("second", thread=7)
    telegram.wait_for(DRAFT, containing="place", thread=7)
    telegram.write("/new", thread=7)
    telegram.write("/status", thread=7)
    assert command(telegram, (telegram.answer("Waiting: second", thread=7), "Remove: second")).text == "Removed."
    bot.open_gate("gate")
    telegram.answer("A new session has begun", thread=7)


@bot_with(MAX_PROCESSES=1)
def test_the_only_message_of_a_turn_that_waits_for_a_place_can_be_taken_back(telegram, bot):
    telegram.write("!wait gate\n!say first", thread=8)
    bot.wait_prompt("!wait gate")
    telegram.write("second", thread=7)
    telegram.wait_for(DRAFT, containing="place", thread=7)
    telegram.write("/status", thread=7)
    telegram.press(telegram.answer("Waiting: second", thread=7), "Remove")
    wait_until(lambda: states(bot)[1:] == ["done"] * 3, what="the end of what was removed")
    bot.open_gate("gate")
    telegram.answer("first", thread=8)
    assert ask(telegram, "third") == "echo: third"
    assert len(telegram.texts(7)) == 3 and len(bot.prompts()) == 2


def test_a_command_behind_what_was_taken_back_is_still_the_bots(telegram, bot):
    bot.habits(initialize={"gate": "begin"})
    for text in ("first", "/new"):
        telegram.write(text, thread=7)
    telegram.write("/status", thread=7)
    command(telegram, (telegram.answer("Waiting: first", thread=7), "Remove: first"))
    bot.open_gate("begin")
    telegram.answer("A new session has begun", thread=7)
    assert ask(telegram, "second") == "echo: second" and len(bot.prompts()) == 1


def test_a_reply_outside_topics_stays_outside(telegram, bot):
    first = telegram.write("first")
    telegram.answer("echo: first", thread=None)
    reply = telegram.write("!recall", reply_to=first, message_thread_id=first["message_id"])
    assert "before: first" in telegram.answer(after=reply).text and telegram.texts(None) == telegram.texts()


def most_at_once(bot):
    """How many agents there were at most."""
    count = most = 0
    for entry in bot.wire():
        count += {"start": 1, "exit": -1}.get(entry["dir"], 0)
        most = max(most, count)
    return most


@bot_with(MAX_PROCESSES=3)
@ahead
def test_twelve_topics_share_three_places(telegram, bot):
    with telegram.batch_of_updates():
        for thread in range(11, 23):
            telegram.write(f"!wait go\n!say topic {thread}", thread=thread)
    bot.wait_wire("in", "session/prompt", count=3)
    drafts = {thread: telegram.wait_for(DRAFT, thread=thread) for thread in range(11, 23)}
    begun = time.monotonic()
    assert "Waiting for a free place" in ask(telegram, "/status", 20)
    for thread in (11, 21):
        telegram.stop(drafts[thread])
        assert "Stopped" in telegram.answer(thread=thread).text
    assert time.monotonic() - begun < 2
    bot.open_gate("go")
    for thread in set(range(11, 23)) - {11, 21}:
        telegram.answer(f"topic {thread}", thread=thread)
    assert most_at_once(bot) == 3


@bot_with(dict(FRAME_SECONDS=0.02), MAX_PROCESSES=2, WARM_SECONDS=0)
@ahead
def test_a_free_place_goes_to_whoever_holds_fewest(telegram, bot):
    for thread in range(1, 7):
        telegram.write(f"!wait go{thread}\n!say topic {thread}", thread=thread)
        if thread < 3:
            bot.wait_prompt(f"!wait go{thread}")
    for thread in range(3, 7):
        telegram.wait_for(DRAFT, thread=thread, containing="Waiting for a free place")
    telegram.write("!say mine", user=BOB, thread=6)
    telegram.wait_for(DRAFT, user=BOB, thread=6, containing="Waiting for a free place (ahead of you: 0)")
    bot.open_gate("go1")
    telegram.answer("mine", user=BOB, thread=6)
    telegram.wait_for(DRAFT, thread=6, containing="Waiting for a free place (ahead of you: 2)")  # 4 and 5: now 3 has Bob's
    bot.wait_prompt("!wait go3")
    for thread in range(2, 7):
        bot.open_gate(f"go{thread}")
    for thread in range(1, 7):
        telegram.answer(f"topic {thread}", thread=thread)
    order = [next(name for name in ("mine", *(f"topic {thread}" for thread in range(1, 7))) if name in prompt)
             for prompt in bot.prompts()]
    assert order[:4] == ["topic 1", "topic 2", "mine", "topic 3"]


def test_errands_of_one_topic_hold_up_no_other(telegram, bot):
    stuck = telegram.fault("sendMessage", hang=10, times=None, when=lambda call: call.thread == 7)
    for _ in range(5):
        telegram.write("/status", thread=7)
    telegram.wait_for("sendMessage", thread=7)
    telegram.write("/status", thread=8)
    telegram.answer(thread=8, timeout=8)
    stuck.end()


def test_a_warm_process_stays_while_there_are_free_places(telegram, bot):
    ask(telegram, "hello")
    warm = bot.wait_wire("in", "session/load")["pid"]
    ask(telegram, "elsewhere", 8)
    ask(telegram, "again")
    assert bot.wait_prompt("again")["pid"] == warm


@bot_with(MAX_PROCESSES=1)
@ahead
def test_places_are_given_in_order_of_arrival(telegram, bot):
    threads = [30, 24, 27, 21, 29, 22]
    telegram.write("!wait go", thread=threads[0])
    bot.wait_prompt("!wait go")
    with telegram.batch_of_updates():
        for thread in threads[1:]:
            telegram.write("hello", thread=thread)
    for thread in threads[1:]:
        telegram.wait_for(DRAFT, thread=thread)
    bot.open_gate("go")
    for thread in threads:
        telegram.answer(thread=thread)
    assert [Path(params["cwd"]).name for params in sent(bot, "session/new")] == [str(thread) for thread in threads]


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: what answers look like
# ---------------------------------------------------------------------------------------------------------


def dictate(telegram, bot, text, size=20, thread=7):
    """Let Kiro answer with this text, in chunks of that size."""
    bot.control_file("text", text)
    return telegram.write(f"!recite text {size}", thread=thread)


def recite(telegram, bot, text, thread=7):
    """Let Kiro say this; returns the lasting messages, as texts."""
    message = dictate(telegram, bot, text, 5000, thread)
    telegram.wait_until(lambda: telegram.is_acknowledged(message))
    settle(bot)
    return telegram.texts(thread, after=message)


@ahead
def test_a_long_plain_answer_arrives_whole_and_in_order(telegram, bot):
    paragraphs = "\n\n".join(f"Paragraph {n} says\n" + "something rather long " * 12 + "." for n in range(60))
    line = " ".join(f"word{n}" for n in range(2000))
    smileys = "😀" * 5000
    for text, glue in ((paragraphs, "\n\n"), (line, ""), (smileys, "")):
        parts = recite(telegram, bot, text)
        assert len(parts) >= 3 and max(map(utf16_length, parts)) <= 4096
        assert glue.join(parts) == text
    assert all(call.params["link_preview_options"] == {"is_disabled": True} for call in telegram.find("sendMessage"))


CODE_LINES = [f"    call_{n}(x < {n}, '$a $b')  # || ==" + " " * (n % 3) for n in range(1500)]


CODE_LINES = [f"    call_{n}(x < {n}, '$a $b')  # || ==" + " " * (n % 3) for n in range(1500)]
LONG_CODE = "**Before**\n\n```python\n" + "\n".join(CODE_LINES) + "\n```\n\nAfter $5 and $6."


def test_a_code_block_is_closed_and_reopened_at_a_split(telegram, bot):
    parts = recite(telegram, bot, LONG_CODE)
    assert max(map(len, parts)) <= 32768 and len(parts) > 1
    code = []
    for part in parts:
        inside = re.search(r"^```python\n(.*?)\n```$", part, re.DOTALL | re.MULTILINE)
        code += inside[1].split("\n") if inside else []
        assert part.count("```") == 2 * bool(inside)
    assert code == CODE_LINES
    assert parts[0].startswith("**Before**") and parts[-1].endswith("6.")
    assert not telegram.garbled and not telegram.find(ok=False)


def monospaced(call):
    """The (type, text, language) of a message's entities."""
    units = call.text.encode("utf-16-le")
    return [(entity["type"], units[2 * entity["offset"]:2 * (entity["offset"] + entity["length"])].decode("utf-16-le"),
             entity.get("language") or None) for entity in call.params.get("entities") or []]


@bot_with(RICH_MESSAGES="off")
@ahead
def test_the_plain_form_keeps_code_and_tables_monospaced(telegram, bot):
    recite(telegram, bot, LONG_CODE)
    calls = telegram.find("sendMessage")
    code = [entity for call in calls for entity in monospaced(call)]
    assert {(kind, language) for kind, _, language in code} == {("pre", "python")}
    assert "\n".join(text for _, text, _ in code).split("\n") == CODE_LINES and "```" not in "".join(c.text for c in calls)
    recite(telegram, bot, "😀 run `a` in **b**:\n\n> ```\n> c\n> ```\n\n| x | y |\n|---|---|\n| 1 | `2` |\n\n    d\n")
    last = telegram.find("sendMessage")[-1]
    assert last.text == "😀 run a in **b**:\n\n> c\n\n| x | y |\n|---|---|\n| 1 | `2` |\n\n    d"
    assert monospaced(last) == [("code", "a", None), ("pre", "c", None), ("pre", "| x | y |\n|---|---|\n| 1 | `2` |", None),
                                ("pre", "    d", None)]
    recite(telegram, bot, "`a` " * 150)
    assert len(monospaced(telegram.find("sendMessage")[-1])) == 100 and telegram.find("sendMessage")[-1].text.count("`") == 100
    telegram.fault("sendMessage", status=400, description="Bad Request: can't parse entities")
    assert recite(telegram, bot, "run `a`") == ["run `a`"]


# What Kiro writes, and the rich message that it becomes.
MARKDOWN = [
    ("[![CI](https://img.shields.io/b.svg)](https://github.com/x/y)", "[CI](https://github.com/x/y)"),
    ("see “https://example.com/a” and **b**", "see “[https://example.com/a](https://example.com/a)” and **b**"),
    ("https://example.com/a… **b** and (https://example.com/b).",
     "[https://example.com/a](https://example.com/a)… **b** and ([https://example.com/b](https://example.com/b))."),
    ("请看https://example.com/文档。然后继续，再说。**b**", "请看[https://example.com/文档](https://example.com/文档)。然后继续，再说。**b**"),
    ("https://example.com/a_b_**c**", "[https://example.com/a\\_b\\_](https://example.com/a_b_)**c**"),
    ("_https://example.com/a_ ok!https://example.com",
     "_[https://example.com/a](https://example.com/a)_ ok\\![https://example.com](https://example.com)"),
    ("https://example.com/a)b **x**", "[https://example.com/a](https://example.com/a))b **x**"),
    ("http://localhost:80/a <https://example.com/b>", "`http://localhost:80/a` [https://example.com/b](https://example.com/b)"),
    ("[see https://example.com](https://example.com/x)", "[see https://example.com](https://example.com/x)"),
    ("- press ` to open\n- run `echo $HOME`", "- press \\` to open\n- run `echo $HOME`"),
    ("| Key | Use |\n|---|---|\n| ` | code |\n| `$x` | var |", "| Key | Use |\n|---|---|\n| \\` | code |\n| `$x` | var |"),
    ("Example:\n\n    $ ls <b> [x](y)\n\nafter **b**", "Example:\n\n    $ ls <b> [x](y)\n\nafter **b**"),
    ("- a\n\n      $ [x](y)\n\n  $ 1", "- a\n\n      $ [x](y)\n\n  \\$ 1"),
    ("a\n    $ 1", "a  \n    \\$ 1"),
    ("```markdown\n1. Step\n\n    ```sh\n    echo\n    ```\n```\n\nafter [x](rel.md) costs $5 and $6",
     "```markdown\n1. Step\n\n    ```sh\n    echo\n    ```\n```\n\nafter x (`rel.md`) costs \\$5 and \\$6"),
    ("> ```\n> code\nout [x](y.md) $5 and $6", "> ```\n> code\nout x (`y.md`) \\$5 and \\$6"),
    ("- ```\n  $x\nout $5", "- ```\n  $x\nout \\$5"),
    ("1. > ```\n   > $x\n   > ```\n   $5", "1. > ```\n   > $x\n   > ```\n   \\$5"),
    ("Text? | A | B |\n|---|---|\n| 1 | 2 |", "Text? | A | B |  \n|---|---|  \n| 1 | 2 | "),
    ("|| A | B |\n|---|---|---|\n| x || 2 |", "| | A | B |\n|---|---|---|\n| x | | 2 |"),
    ("a | b\n--|--\n1 | $2", "a | b\n--|--\n1 | \\$2"),
    ("Table:\n| a |\n|-|\n| b |\nc\n\nd\ne", "Table:\n| a |\n|-|\n| b |\nc\n\nd  \ne"),
    ("|" + "a|" * 21 + "\n|" + "-|" * 21, "```\n|" + "a|" * 21 + "\n|" + "-|" * 21 + "\n```"),
    ("> |" + "a|" * 21 + "\n> |" + "-|" * 21, "> ```\n> |" + "a|" * 21 + "\n> |" + "-|" * 21 + "\n> ```"),
    ("Title\n=====\n\n# a $\n***\na\n---", "Title\n=====\n\n# a \\$\n***\na\n---"),
    ("See the [docs][D] and [d].\n\n[d]: https://example.com/d\n[e]: x",
     "See the [docs](https://example.com/d) and [d](https://example.com/d).\n\n\n\\[e]: x"),
    ("`[d]` [d] [d][x]\n\n[d]: rel.md", "`[d]` d (`rel.md`) [d][x]\n\n"),
    ("line one\\\nline two **b**\nthree", "line one  \nline two **b**  \nthree"),
    ("Use the <br> tag, or Vec<T>. **b**<br>c", "Use the &lt;br> tag, or Vec&lt;T>. **b** c"),
    ("f[a](b) and arr[0](x) **b**", "f\\[a]\\(b) and arr\\[0]\\(x) **b**"),
    ("[wiki](https://en.wikipedia.org/wiki/C_(language))", "[wiki](https://en.wikipedia.org/wiki/C_(language))"),
    ("[[1](https://e.com/1), [2](https://e.com/2)]", "[[1](https://e.com/1), [2](https://e.com/2)]"),
    ('[a](https://e.com "t") [`x.py`](src/x.py#L1) [b]() ![c](d.png) ![e](https://e.com/f) [g](h i)',
     "[a](https://e.com) `src/x.py#L1` b c (`d.png`) [e](https://e.com/f) [g]\\(h i)"),
    ("`a $\n$ b` $ \\$ `` ` $ ``", "`a $\n$ b` \\$ \\$ `` ` $ ``"),
    ("a\n2. b\n#c ==d== ||e||\n[x]: y z", "a  \n2. b  \n\\#c \\=\\=d\\=\\= \\|\\|e\\|\\|  \n\\[x]: y z"),
]


@pytest.mark.parametrize("source, sent", MARKDOWN, ids=lambda text: text[:30])
def test_what_kiro_writes_means_the_same_to_telegram(source, sent):
    assert program.rich_safe(program.resolved(source)) == sent
    assert program.rich_safe(sent) == sent


@pytest.mark.parametrize("text, is_rich", [
    ("Title\n=====", True), ("a | b\n--|--\n1 | 2", True), ("See [d].\n\n[d]: https://example.com/d", True), ("- a", True),
    ("[wiki](https://en.wikipedia.org/wiki/C_(language))", True), ("a `b`", True), ("a **b** c", True), ("_a b_", True),
    ("请**看**", True), ("> a", True), ("a\n\n    b", True), ("```\na", True), ("~~a~~", True), ("***", True),
    ("https://example.com/a_b_c", False), ("src/**/*.py and test/**/*.py", False), ("/usr/lib/_a_/x", False), ("*.py", False),
    ("__init__.py", False), ("a * b * c", False), ("snake_case_name", False), ("a | b", False), ("`", False), ("1.5", False),
    ("#1", False), ("$5 <a>", False), ("> " * 20 + "a", False), ("", False)])
def test_what_is_markdown(text, is_rich):
    assert program.has_markdown(text) == is_rich


def rich_pieces(text):
    """The Markdown of the rich messages that a text becomes, before it is made safe."""
    return program.split_text(program.resolved(text), *program.RICH_LIMITS)


PHRASES = ["{}", "**{}**", "`{} $x`", "`` {} ` ``", "[{}](https://example.com/a_b)", "[{}](src/a.py)", "${}", "=={}==", "a||{}",
           "<{}>", "{} https://example.com/{}.", "*{}*", "~~{}~~", "` {}", "#{}", "\\*{}", "[{}]", "snake_{}_case", "![{}](x)"]


def random_document(chance, number, depth=0):
    """Markdown in which each word occurs once; in code blocks the words begin with c."""
    def phrase():
        return chance.choice(PHRASES).replace("{}", f"w{next(number)}", 1).replace("{}", "x")

    def words():
        return "\n".join(" ".join(phrase() for _ in range(chance.randint(1, 6))) for _ in range(chance.randint(1, 3)))

    def code():
        return "\n".join(f"{' ' * chance.randint(0, 5)}c{next(number)} $x [a](b) `" for _ in range(chance.randint(1, 9)))

    def row(columns):
        return "| " + " | ".join(f"w{next(number)} `$`" for _ in range(columns)) + " |"

    def inside(mark, text):
        return mark + text.replace("\n", "\n" + (mark if ">" in mark else " " * len(mark)))

    def block():
        kind = chance.randint(0, 7 if depth < 2 else 4)
        columns = chance.randint(1, 22)
        return [words, lambda: f"# {phrase()}", lambda: f"```sh\n{code()}\n```",
                lambda: f"# w{next(number)}\n\n    c{next(number)} $ `",
                lambda: "\n".join([row(columns), "|" + "-|" * columns, *(row(columns) for _ in range(chance.randint(0, 5)))]),
                lambda: inside("> ", random_document(chance, number, depth + 1)),
                lambda: "\n".join(inside("- ", random_document(chance, number, depth + 1)) for _ in range(columns % 4 + 1)),
                lambda: "\n\n".join(inside("1. ", words()) for _ in range(chance.randint(1, 9)))][kind]()

    return "\n\n".join(block() for _ in range(chance.randint(1, 4)))


@pytest.mark.parametrize("seed", range(2))
def test_of_no_document_is_a_word_lost_or_code_changed(seed):
    chance = random.Random(seed)
    for _ in range(500):
        text = random_document(chance, iter(range(10**6)))
        wanted = re.findall(r"\b[wc]\d+", text)
        safe = program.rich_safe(program.resolved(text))
        assert program.rich_safe(safe) == safe and re.findall(r"\b[wc]\d+", safe) == wanted
        assert set(re.findall(r"c\d+.*", text)) <= set(re.findall(r"c\d+.*", safe))
        limit = chance.choice([900, 2000, 4096])
        for pieces in (list(program.split_text(text, limit)), list(rich_pieces(text))):
            assert list(dict.fromkeys(re.findall(r"\b[wc]\d+", "\n".join(pieces)))) == wanted  # a head may be repeated
            for piece in pieces:
                assert program._read(piece)[-1].kind not in ("fence", "code") and len(program.rich_safe(piece)) <= 32768
        assert all(len(piece) <= limit for piece in program.split_text(text, limit))


def test_pieces_go_on_where_they_were_cut(telegram, bot):
    assert recite(telegram, bot, "**a**\r\n\r\n```\r\n$x\r\n```\r\n\r\n$y") == ["**a**\n\n```\n$x\n```\n\n\\$y"]
    table = "\n".join(["| a | b |", "|---|---|"] + [f"| {n} | {'x' * 90} |" for n in range(400)])
    pieces = list(rich_pieces("Before.\n" + table + "\n\nAfter."))
    assert pieces[0] == "Before." and all(piece.startswith("| a | b |\n|---|---|\n| ") for piece in pieces[1:-1])
    assert len(list(rich_pieces("x\n\n" * 1000 + "\n".join(table.split("\n")[:200])))[-1]) > 18_000
    item = f"- a\n  1. b\n\n     ```sh\n{('     ' + 'x' * 90 + chr(10)) * 400}     ```\n\n     c\n"
    first, *_, last = rich_pieces(item + "- d")
    assert first == "- a\n  1. b" and last.startswith("- 1. ```sh\n     xxx")
    assert last.endswith("x\n     ```\n\n     c\n- d")
    paragraphs = list(rich_pieces("\n\n".join("word " * 200 for _ in range(50))))
    assert max(map(len, paragraphs)) <= 6000
    items = "\n".join(f"- item **{n}**" for n in range(300))
    assert "\n".join(recite(telegram, bot, items)) == items and not telegram.find("sendMessage")
    assert not telegram.find(ok=False)


def test_a_part_that_is_too_large_for_telegram_is_halved(telegram, bot):
    text = "\n\n".join(f"paragraph **{n}**" + " word" * 30 for n in range(24))
    telegram.fault("sendRichMessage", status=400, description="Bad Request: RICH_MESSAGE_BLOCKS_TOO_MANY", times=2)
    parts = recite(telegram, bot, text)
    assert 3 <= len(parts) <= 5 and "\n\n".join(parts) == text and not telegram.find("sendMessage")


@ahead
def test_of_a_very_long_answer_both_ends_are_shown_and_all_is_in_a_file(telegram, bot):
    text = "\n".join(f"line {n} of an answer without end" for n in range(30_000)) + "\nthe end"
    proxy = telegram.fault("sendDocument", status=502, times=None)
    dictate(telegram, bot, text, 50_000)
    wait_until(lambda: proxy.hits, 20)
    bot.restart()  # what is left stands in the journal, with the file
    proxy.end()
    telegram.answer("the end", thread=7)
    [file] = telegram.find("sendDocument")
    assert file.files["document"] == ("answer.md", text.encode()) and "messages are left out" in file.text
    assert len(telegram.texts(7)) == 7 and telegram.texts(7)[0].startswith("line 0 ")


RISKY = """\
# A heading
#tag and a price of $5 to $6, ||hidden||, ==marked==, a <word> and me@example.org or odd:me@example.org
See [the file](src/main.py:12), [a word](word), [good](https://example.org/a_b?q=1) and <https://example.org>.
![a picture](shots/a.png) and ![far](https://example.org/a.png)
[INFO]: costs $7 or $8 for <T>

| a | b |
|---|---|
| 1 | x || y |

- item
  continued

`code with $1 || $2 <b>`
```sh
echo $HOME || cat <file>  # [x](y)
```
Title
-----
the end of it
"""


def test_markdown_is_made_safe_and_looks_right(telegram, bot):
    [part] = recite(telegram, bot, RISKY)
    assert telegram.find("sendRichMessage")[-1].params["rich_message"]["skip_entity_detection"] is True
    assert not telegram.garbled and not telegram.find(ok=False)
    for kept in ("# A heading", "[good](https://example.org/a_b?q=1)", "| a | b |\n|---|---|", "`code with $1 || $2 <b>`",
                 "```sh\necho $HOME || cat <file>  # [x](y)\n```", "the file", "src/main.py:12", "a picture", "- item"):
        assert kept in part
    assert "![" not in part and "\\$5" in part and "&lt;word" in part


def rings(call):
    """Does the phone ring for this message?"""
    return not call.params.get("disable_notification")


@bot_with(dict(ASK_RETRY_SECONDS=0.2))
@ahead
def test_a_turn_rings_once(telegram, bot):
    telegram.fault("sendMessage", status=500, when=lambda call: "Kiro wants to" in call.text)
    note = '!raw {"jsonrpc":"2.0","method":"_kiro.dev/agent/config_error","params":{"error":"a note"}}\n'
    bot.control_file("long", "".join(f"**line** {number}\n" for number in range(8000)))
    refused = telegram.fault("sendRichMessage", status=400, when=lambda call: "7999" in call.text)
    telegram.write(f"{note}!ask Running: make\n!recite long 5000", thread=7)
    asked = telegram.answer("Kiro wants to", thread=7)
    telegram.press(asked, "Yes")
    telegram.answer("line** 7999", thread=7)
    telegram.write('!say Here: <send_file path="missing">\n!say <send_file path="a.txt">' + "c" * 1100 + "</send_file>"
                   '<send_file path="gone"></send_file>\n!file a.txt hello', thread=8)
    telegram.answer("to send gone", thread=8)
    telegram.write("/status", thread=9)
    assert rings(asked) and rings(telegram.answer("Nothing is running", thread=9)) and refused.hits == 1
    for thread, count in ((7, 6), (8, 4)):
        told = [call for call in telegram.find(thread=thread) if call is not asked]
        assert len(told) >= count and [rings(call) for call in told] == [False] * (len(told) - 1) + [True], told


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: models
# ---------------------------------------------------------------------------------------------------------


def model_list(telegram, thread=7):
    """Ask for the models; returns the call that sent the list with its buttons."""
    message = telegram.write("/model", thread=thread)
    return telegram.answer(thread=thread, after=message)


def choose(telegram, listed, name):
    """Press a model's button and wait until the bot says so, as it does when the name is written."""
    query = telegram.press(listed, name)
    assert toast(telegram, query) == "OK"
    telegram.answer("Model for this topic: ", thread=7, after=query)


@ahead
def test_a_model_is_chosen_before_the_first_message(telegram, bot):
    listed = model_list(telegram)
    assert [button["text"].lstrip("✓ ") for button in telegram.buttons(listed)] == MODELS
    choose(telegram, listed, "claude-haiku-4.5")
    assert row_of(bot)["model"] == "claude-haiku-4.5"
    assert ask(telegram, "!model") == "model: claude-haiku-4.5"
    refusal = ask(telegram, "/model gpt-2")
    assert "gpt-2" in refusal and all(model in refusal for model in MODELS)
    assert row_of(bot)["model"] == "claude-haiku-4.5"
    ask(telegram, "/model claude-sonnet-4")
    assert ask(telegram, "!model") == "model: claude-sonnet-4"
    assert ask(telegram, "!model", 8) == "model: auto"


def test_a_model_is_chosen_during_a_turn(telegram, bot):
    telegram.write("!wait go\n!model", thread=7)
    bot.wait_prompt("!wait go")
    choose(telegram, model_list(telegram), "qwen3-coder-next")
    bot.open_gate("go")
    telegram.answer("model: auto")
    assert ask(telegram, "!model") == "model: qwen3-coder-next"


@pytest.mark.parametrize("dialect", ["config", "grouped", "both", "models"])
@bot_with(WARM_SECONDS=0)
@ahead
def test_every_dialect_and_any_model_id_is_understood(telegram, bot, dialect):
    long = "anthropic/" + "claude" * 20 + "[1m](beta)"
    bot.habits(dialect=dialect, models=["auto", "short", long, long + "2"], forget_model=True)
    listed = model_list(telegram)
    assert len({button["callback_data"] for button in telegram.buttons(listed)}) == 4
    telegram.answer("Model for this topic: anth", thread=7, after=telegram.press(listed, 2))
    assert row_of(bot)["model"] == long
    assert ask(telegram, "hello") == "echo: hello"
    assert ask(telegram, "/model short").startswith("Model for this topic: short")
    for _ in range(2):
        assert ask(telegram, "!model") == "model: short"
    setters = [entry["frame"] for entry in bot.wire("in") if "set_" in entry["frame"].get("method", "")]
    by_option = dialect in ("config", "grouped")
    assert {frame["method"] for frame in setters} == {"session/set_config_option" if by_option else "session/set_model"}
    assert {frame["params"].pop("sessionId") for frame in setters} == {row_of(bot)["session_id"]}
    chosen = [{"configId": "llm", "value": model} if by_option else {"modelId": model} for model in (long, "short", "short")]
    assert [frame["params"] for frame in setters] == chosen


def test_of_hundreds_of_models_those_that_fit_are_buttons(telegram, bot):
    bot.habits(models=["auto", *(f"model {n} " + "x" * 60 for n in range(300))])
    assert 30 < len(telegram.buttons(model_list(telegram))) <= 100
    assert ask(telegram, "/model " + "model 299 " + "x" * 60).startswith("Model for this topic: model 299")


def test_an_agent_that_names_no_models_has_none_to_choose_from(telegram, bot):
    bot.habits(dialect="none")
    assert ask(telegram, "hello") == "echo: hello"
    assert ask(telegram, "/model claude-sonnet-4").startswith("Kiro reports no models")


def test_the_last_of_two_quick_choices_counts(telegram, bot):
    bot.habits(set_model={"gate": "go"})
    ask(telegram, "/model")
    ask(telegram, "/model claude-haiku-4.5")
    telegram.write("!model", thread=7)
    bot.wait_wire("in", "session/set_model")
    ask(telegram, "/model claude-sonnet-4")
    bot.open_gate("go")
    telegram.answer("model: ")  # of either: the first choice may have been on its way before the message came
    assert ask(telegram, "!model") == "model: claude-sonnet-4"


def test_a_stop_leaves_no_choice_behind(telegram, bot):
    bot.habits(set_model={"gate": "go"})
    ask(telegram, "/model")
    ask(telegram, "/model claude-haiku-4.5")
    telegram.write("never", thread=7)
    bot.wait_wire("in", "session/set_model")
    telegram.write("/stop", thread=7)
    telegram.answer("Stopped")
    bot.open_gate("go")
    ask(telegram, "/model claude-sonnet-4")
    assert ask(telegram, "!model") == "model: claude-sonnet-4"


def test_kiro_is_told_no_model_where_nobody_chose_one(telegram, bot):
    bot.habits(forget_model=True)
    ask(telegram, "hello")
    ask(telegram, "again")
    assert not sent(bot, "session/set_model")
    ask(telegram, "/model auto")
    ask(telegram, "once more")
    assert "Model: auto" in ask(telegram, "/status")


@ahead
def test_a_folder_that_is_gone_is_not_made_again_where_the_topic_has_its_own(telegram, bot):
    ask(telegram, "hello")
    bot.wait_wire("in", "session/load")  # the warm process is not to load what is written now
    elsewhere = bot.folder / "elsewhere" / "1001" / "7"
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as connection:
        connection.execute("UPDATE sessions SET workspace_path = ?", (str(elsewhere),))
    bot.restart()
    ask(telegram, "again")
    assert not elsewhere.exists()
    assert bot.database()[0]["workspace_path"] == str(bot.workspace(7).resolve())


@ahead
def test_a_model_chosen_while_a_session_begins_stays(telegram, bot):
    ask(telegram, "hello")
    bot.habits(new={"gate": "go"})
    telegram.write("/new", thread=7)
    bot.wait_wire("in", "session/new", count=2)
    ask(telegram, "/model claude-haiku-4.5")
    bot.open_gate("go")
    telegram.answer("claude-haiku-4.5. Folder")
    assert ask(telegram, "!model") == "model: claude-haiku-4.5"


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: folders, former sessions, the terminal, titles
# ---------------------------------------------------------------------------------------------------------


def make_source(bot):
    """Make a folder that may be allowed, beside the bot's: two projects, and what is none."""
    source = bot.folder.parent / "src"
    for name in ("website", "notes", "notes/deep", ".hidden", "x" * 200):
        (source / name).mkdir(parents=True)
    (source / "file").write_text("")
    (source / "out").symlink_to("/etc")
    return source


def command(telegram, text, thread=7):
    """Write a command, or press a button given as (message, button); returns the call that answers it."""
    if isinstance(text, str):
        return telegram.answer(thread=thread, after=telegram.write(text, thread=thread))
    mark = telegram.mark()
    telegram.press(*text)
    return telegram.answer(thread=thread, after=mark)


@ahead
def test_a_topic_works_in_a_folder_that_is_allowed(telegram, bot):
    source = make_source(bot)
    bot.restart(ALLOWED_FOLDERS=f"{source}, {source}/gone")
    bot.wait_log(f"ALLOWED_FOLDERS: there is no folder {source}/gone")
    ask(telegram, "hello")
    ask(telegram, "/model claude-haiku-4.5")
    listed = command(telegram, "/folder")
    assert f"works in {bot.workspace(7)}" in listed.text
    names = ["This topic's own folder", str(source), f"{source}/notes", f"{source}/website", "x" * 60]
    assert [button["text"].removeprefix("✓ ")[-60:] for button in telegram.buttons(listed)] == [name[-60:] for name in names]
    assert telegram.buttons(listed)[0]["text"].startswith("✓")
    begun = command(telegram, (listed, "website"))
    assert "new session" in begun.text and f"Folder: {source}/website" in begun.text
    assert row_of(bot)["workspace_path"] == f"{source}/website"
    assert ask(telegram, "!file a.txt hi\n!model") == "model: claude-haiku-4.5"
    assert (source / "website" / "a.txt").exists()
    ceilings = [entry["frame"]["environment"]["GIT_CEILING_DIRECTORIES"] for entry in bot.wire("start")
                if entry["frame"]["cwd"] == f"{source}/website"]
    assert ceilings and not any(str(source) in ceiling for ceiling in ceilings)
    telegram.send_file("document", b"data", "data.bin", thread=7)
    assert f"{source}/website/uploads/data.bin" in telegram.answer("data.bin", thread=7).text
    assert (source / "website" / "uploads" / ".gitignore").read_text() == "*\n"
    (bot.workspace(7) / "own.txt").write_text("mine")
    telegram.write(f'!say <send_file path="{bot.workspace(7)}/own.txt">x</send_file>', thread=7)
    telegram.answer("outside of this topic's folder", thread=7)
    bot.restart()
    assert "2 before" not in ask(telegram, "!recall") and row_of(bot)["workspace_path"] == f"{source}/website"
    back = command(telegram, (begun, "Back to the former session"))
    assert f"Folder: {bot.workspace(7)}" in back.text and "“hello”" in back.text
    assert "before: hello" in ask(telegram, "!recall")
    assert command(telegram, "/folder notes/deep").text.endswith("/notes/deep")
    assert command(telegram, "/folder src").text.endswith(f"Folder: {source}")
    assert "works in" in command(telegram, f"/folder {source}").text


@ahead
def test_a_folder_that_no_topic_may_work_in_is_refused_with_the_reason(telegram, bot):
    source = make_source(bot)
    bot.restart(ALLOWED_FOLDERS=f"{source},{source.parent}")
    ask(telegram, "hello")
    (bot.workspace(8) / "deep").mkdir(parents=True)
    before = row_of(bot)
    for path in ("/etc", "../..", "out", "/", "a\0b", "../\u202e", "no-such", "file", "y" * 4000, f"{source}/no\nsuch",
                 str(bot.folder), "bot", "bot/workspaces/1001", str(bot.workspace(8)), f"{bot.workspace(8)}/deep",
                 str(bot.home), "home/.kiro", "home/.kiro/sessions", str(source.parent)):
        refused = command(telegram, f"/folder {path}")
        assert f"not among the allowed folders.\n{source}" in refused.text and telegram.buttons(refused), path
        assert row_of(bot) == before


@ahead
def test_a_chosen_folder_that_is_gone_is_told_and_never_made(telegram, bot):
    source = make_source(bot)
    bot.restart(ALLOWED_FOLDERS=f"{source}, {source}/gone")
    command(telegram, "/folder website")
    ask(telegram, "hello")
    settle(bot)
    shutil.rmtree(source / "website")
    bot.restart()
    message = telegram.write("is it there?", thread=7)
    failed = telegram.answer(f"{source}/website is missing", thread=7, after=message)
    offered = telegram.answer("This topic works in", thread=7, after=message)
    assert command(telegram, (offered, "own folder")).text.endswith(str(bot.workspace(7)))
    telegram.press(failed, "Ask again")
    telegram.answer("echo: is it there?", thread=7)
    assert not (source / "website").exists()
    bot.restart(ALLOWED_FOLDERS=None)
    assert "ALLOWED_FOLDERS" in ask(telegram, "/folder") and "folders.\nWhoever runs" in ask(telegram, f"/folder {source}")


@ahead
def test_a_topic_with_the_name_of_a_folder_starts_there(telegram, bot):
    source = make_source(bot)
    bot.restart(ALLOWED_FOLDERS=f"{source}, {source}/gone")
    with telegram.batch_of_updates():
        telegram.name_topic(7, "website")
        telegram.write("hello", thread=7)
        telegram.name_topic(8, "Nothing of the kind")
        telegram.write("hello", thread=8)
        telegram.name_topic(9, "notes", is_name_implicit=True)
        telegram.write("notes", thread=9)
    for thread, text in ((7, "hello"), (8, "hello"), (9, "notes")):
        telegram.answer(f"echo: {text}", thread=thread)
    assert f"Folder: {source}/website" in telegram.texts(7)[0]
    assert row_of(bot)["workspace_path"] == f"{source}/website"
    assert telegram.texts(8) == ["echo: hello"] and telegram.texts(9) == ["echo: notes"]
    assert len(sent(bot, "session/new")) == 3
    settle(bot)
    assert not telegram.find("editForumTopic", ok=None)


def test_a_name_of_two_folders_is_asked_back(telegram, make_bot, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "same").mkdir(parents=True)
    make_bot(ALLOWED_FOLDERS=f"{tmp_path}/a,{tmp_path}/b").start()
    asked = command(telegram, "/folder same")
    assert asked.text == "Which same?"
    assert command(telegram, (asked, "b/same")).text.endswith("b/same")


def named_kiro(folder):
    """A KIRO_COMMAND by which the stand-in goes by Kiro's name."""
    program = folder / "kiro-cli"
    program.write_text(f'#!/bin/bash\nexec -a "$0" {KIRO_COMMAND} "$@"\n')
    program.chmod(0o755)
    return f"{program} acp --agent-engine v2"


@pytest.mark.parametrize("dialect", ["kiro", "acp", "none"])
@ahead
def test_a_topic_goes_on_with_another_session_of_its_folder(telegram, bot, dialect):
    source = make_source(bot)
    bot.habits(lists=dialect == "acp")
    bot.restart(ALLOWED_FOLDERS=source, **{"KIRO_COMMAND": named_kiro(source)} if dialect == "kiro" else {})
    command(telegram, "/folder notes")
    asked = ["first of all", "second", "third\n!say line two \u202e", "x " * 200]
    for text in asked[:-1]:
        ask(telegram, text)
        command(telegram, "/new")
    ask(telegram, asked[-1])
    command(telegram, "/folder notes", thread=8)
    ask(telegram, "of another topic", thread=8)
    settle(bot)
    listed = command(telegram, "/sessions")
    texts = [button["text"] for button in telegram.buttons(listed)]
    assert [text for text in texts if text.startswith("✓ x x x")] and all(len(text) < 60 for text in texts)
    assert {"first of all · 0 min", "second · 0 min", "third · 0 min", "Continue in a terminal"} <= set(texts)
    assert len(texts) == (5 if dialect == "none" else 6)
    gone_on = command(telegram, (listed, "first of all"))
    assert "Going on with “first of all”" in gone_on.text
    assert "before: first of all" in ask(telegram, "!recall")
    assert telegram.buttons(command(telegram, (listed, "first of all")))[0]["text"].startswith("✓ first of all")
    if dialect != "none":
        assert "Another topic has that session: of another topic" in command(telegram, (listed, "of another topic")).text
    assert "no such session" in command(telegram, f"/sessions {session_id(bot, 8)}0").text
    bot.restart()
    assert "x x x" in command(telegram, (gone_on, "Back to the former session")).text
    assert "before: x x x" in ask(telegram, "!recall")


@ahead
def test_a_session_that_kiro_no_longer_has_leaves_the_topic_as_it_is(telegram, bot):
    ask(telegram, "first")
    lost = session_path(bot, 7, "*")
    back = command(telegram, "/new")
    ask(telegram, "second")
    settle(bot)
    before = row_of(bot)
    bot.habits(load={"gate": "go"})
    telegram.press(back, "Back")
    bot.wait_wire("in", "session/load", when=lambda entry: entry["frame"]["params"]["sessionId"] == lost.stem)
    telegram.write("/stop", thread=7)
    telegram.answer("⏹ Stopped.", thread=7)
    bot.open_gate("go")
    assert "before: second" in ask(telegram, "!recall") and row_of(bot)["session_id"] == before["session_id"]
    settle(bot)
    for path in lost.parent.glob(lost.name):
        path.unlink()
    for _ in range(2):
        assert "no longer opens that session" in command(telegram, (back, "Back")).text
    assert row_of(bot)["session_id"] == before["session_id"]
    assert "before: second" in ask(telegram, "!recall")


LISTS = [
    (dict(list={"error": -32603}), []), (dict(list={"hang": True}), []), (dict(list={"exit": 1, "times": 1}), []),
    (dict(listed="junk"), []), (dict(listed={"sessions": {"a": 1}}), []), (dict(listed=["x", None]), []),
    (dict(listed=[{}]), []),
    (dict(listed=[{"sessionId": 7, "title": ["y"]}]), ["['y'] · ?"]),
    (dict(listed=[{"sessionId": "../../x", "updatedAt": "2026-13-99T99:99:99Z"}]), ["../../x · ?"]),
    (dict(listed=[{"sessionId": 7, "title": "\u202e\n" + "long " * 2000, "updatedAt": 12}]),
     ["7 · ?"]),
    (dict(listed=10_000), [f"Number {number} · 300 d" for number in range(9991, 10_000)]),
]


@bot_with(dict(LIST_SECONDS=2))
@ahead
def test_an_agent_that_lists_no_sessions_is_no_obstacle(telegram, bot):
    bot.restart(KIRO_COMMAND=named_kiro(bot.home))
    ask(telegram, "hello")
    for habits, shown in LISTS:
        settle(bot)
        bot.habits(**habits)
        listed = [re.sub(r"\d+ d$", "300 d", button["text"]) for button in telegram.buttons(command(telegram, "/sessions"))]
        assert sorted(listed) == sorted([*shown, "✓ hello · 0 min", "Continue in a terminal"]), habits
        assert ask(telegram, "hello again") == "echo: hello again"


def test_a_session_goes_on_in_a_terminal_and_back(telegram, make_bot, tmp_path):
    bot = make_bot("a folder's", KIRO_COMMAND=named_kiro(tmp_path)).start()
    assert "\n\nnone yet\n\n" in command(telegram, "/terminal").text
    assert not telegram.buttons(command(telegram, "/status"))
    ask(telegram, "hello")
    bot.wait_wire("in", "session/load")
    left = command(telegram, (command(telegram, "/status"), "Continue in a terminal"))
    [copy] = telegram.buttons(left)
    folder, session = bot.workspace(7), session_id(bot, 7)
    line = f"cd {shlex.quote(str(folder))} && {tmp_path}/kiro-cli chat --agent-engine v2 --resume-id {session}"
    assert line in left.text and copy["copy_text"]["text"] == line
    bot.wait_agents(0)
    agent = started_agent(bot, 7)
    telegram.write("still there?", thread=7)
    telegram.answer(f"open in another program (process {agent.pid})", thread=7)
    agent.stdin.close()
    agent.wait()
    assert "hello" in ask(telegram, "!recall")


@bot_with(WARM_SECONDS=0)
@ahead
def test_a_session_that_is_left_to_a_terminal_has_no_dead_lock(telegram, bot):
    ask(telegram, "hello")
    telegram.answer("⚠️ Kiro has exited", thread=7, after=telegram.write("!say half\n!kill", thread=7))
    assert session_path(bot, 7, "lock").exists()
    command(telegram, "/terminal")
    assert not session_path(bot, 7, "lock").exists()


@ahead
def test_a_topic_that_nobody_has_named_gets_a_title_once(telegram, bot):
    long = "please look into the thing that is broken on the page"
    for thread, name, implicit, text in ((7, "what I wrote first", True, long), (8, "Named", False, "hello"),
                                         (9, "x", True, "!title An agent's\\n\u202etitle\n!say x"), (10, "same", True, "same")):
        with telegram.batch_of_updates():
            telegram.name_topic(thread, name, **{"is_name_implicit": True} if implicit else {})
            telegram.write(text, thread=thread)
    telegram.wait_for("editForumTopic", thread=7)
    telegram.wait_for("editForumTopic", thread=9)
    telegram.fault("editForumTopic", status=400, description="Bad Request: TOPIC_ID_INVALID")
    for thread in (11, 12):
        telegram.name_topic(thread, "typed", is_name_implicit=True)
    telegram.name_topic(12, "Renamed", created=False)
    for thread in range(7, 13):
        telegram.write("more", thread=thread)
        telegram.answer("echo: more", thread=thread)
    telegram.write("more still", thread=11)
    telegram.answer("more still", thread=11)
    settle(bot)
    calls = telegram.find("editForumTopic", ok=None)
    assert [(call.thread, call.params["name"]) for call in sorted(calls, key=lambda call: call.thread)] == [
        (7, "please look into the thing that is…"), (9, "An agent's"), (11, "more")]
    assert not telegram.find("sendMessage", containing="private", ok=None)


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: tools, /status, warnings, commands
# ---------------------------------------------------------------------------------------------------------


@bot_with(QUICK)
def test_a_running_tool_is_shown_and_sets_texts_apart(telegram, bot):
    telegram.write("!say Before.\n!tool execute Running: make all\n!wait gate\n!tool_done\n"
                   "!say Between.\\n\n!tool read x\n!tool_done\n!say After.", thread=7)
    assert "Before." in telegram.wait_for(DRAFT, containing="Running: make all", thread=7).text
    bot.open_gate("gate")
    assert telegram.answer("After.", thread=7).text == "Before.\n\nBetween.\n\nAfter."


@ahead
def test_a_nearly_full_context_is_told_once(telegram, bot):
    telegram.write("!context 85\n!say one", thread=7)
    telegram.answer("85 %", thread=7)
    telegram.write("!context 90\n!say two", thread=7)
    telegram.answer("two", thread=7)
    telegram.write("!compaction\n!context 90\n!say three", thread=7)
    telegram.answer("90 %", thread=7)
    hints = telegram.texts(containing="%")
    assert len(hints) == 2 and all("/new" in hint and "/compact" in hint for hint in hints)


@ahead
def test_a_session_that_refuses_everything_gets_a_hint(telegram, bot):
    ask(telegram, "hello")
    for number, hint in ((111, False), (222, True)):
        telegram.write(f"!error -32603 ValidationException: image {number} is too large", thread=7)
        told = telegram.answer(f"image {number}", thread=7).text
        assert ("every message in the same way" in told) is hint and ("Ask again;" in told) is not hint
    for _ in range(2):
        assert "/new" not in ask(telegram, "!error -32603 The request was throttled by the service")
    telegram.write("fine", thread=7)
    telegram.answer("echo: fine", thread=7)


@ahead
def test_a_forwarded_command_is_a_text(telegram, bot):
    telegram.write("/new", thread=7, forward_origin={"type": "hidden_user", "date": 1, "sender_user_name": "Carol"})
    telegram.answer("echo: [Forwarded from Carol]\n/new", thread=7)


@ahead
def test_what_looks_like_a_command_and_is_none_is_no_command_for_kiro(telegram, bot):
    telegram.send_file("document", b"x", name="a.txt", caption="/compact this", thread=7)
    telegram.answer("echo: [Message:]\n/compact this\n[File: ", thread=7)
    text = "/new /clear everything"
    telegram.post(thread=7, **with_entities(text, ("bot_command", "/new"), ("code", "everything")))
    telegram.answer("\n/clear `everything`", thread=7)


def test_what_each_process_tells_anew_is_said_once(telegram, bot):
    frame = '{"jsonrpc":"2.0","method":"_kiro.dev/mcp/server_%s","params":{"serverName":"tracker","error":"no"}}'
    failed = frame % "init_failure"
    for n in range(3):
        ask(telegram, f"!raw {failed}\n!say done")
        telegram.answer("done", thread=7, count=n + 1)
    told = ("ℹ️ The MCP server tracker could not be started; Kiro goes on without it. "
            "Whoever runs this bot can look at it.\nno")
    assert telegram.texts(7) == [told, "done", "done", "done"]


@bot_with(dict(FRAME_SECONDS=0.02))
@ahead
def test_a_sign_in_link_is_shown_at_once_and_once(telegram, bot):
    telegram.write("!oauth https://id.test/1\n!oauth https://id.test/1\n!oauth https://id.test/2\n"
                   "!oauth https://user:pw@id.test/3\n!oauth javascript:x\n!wait gate\n!say done", thread=7)
    told = [telegram.answer(f"The MCP server tracker wants you to sign in at {host}:\n{url}\nIf the page", thread=7)
            for host, url in (("id.test", "https://id.test/1"), ("id.test", "https://id.test/2"),
                              ("an odd address", "https://user:pw@id.test/3"), ("an odd address", "javascript:x"))]
    assert [telegram.buttons(call) for call in told] == [
        [{"text": "Sign in at id.test", "url": f"https://id.test/{n}"}] if n < 3 else [] for n in (1, 2, 3, 4)]
    bot.open_gate("gate")
    telegram.answer("done", thread=7)
    assert len(telegram.texts(7)) == 5
    long = '{"jsonrpc":"2.0","method":"_kiro.dev/mcp/oauth_request","params":{"serverName":"s","oauthUrl":"https://long.test/%s"}}'
    bot.control_file("long", long % ("x" * 2_000_000))
    telegram.write("!raw_file long\n" + elicit("m", mode="url", url="ftp://" + "\u202e" * 200_000) + "!say end", thread=9)
    telegram.write("".join(f"!oauth https://many.test/{n}\n" for n in range(1000)) + "!say end", thread=8)
    telegram.answer("elicited: decline null\nend", thread=9, timeout=20)
    assert len(telegram.texts(9)) < 12
    telegram.answer("end", thread=8)
    assert len(telegram.texts(8, containing="many.test")) <= 10


WARM_LINK = """
old = k.StandInKiro.session_load
def session_load(self, request_id, params):
    old(self, request_id, params)
    self.notify("_kiro.dev/mcp/oauth_request", sessionId=params["sessionId"], serverName="warm", oauthUrl="https://id.test/w")
k.StandInKiro.METHODS["session/load"] = session_load
"""


@ahead
def test_a_sign_in_link_of_a_warm_process_does_not_ring(telegram, bot):
    bot.restart(KIRO_COMMAND=patched_kiro(bot.control, WARM_LINK))
    ask(telegram, "first")
    link = telegram.answer("The MCP server warm wants you to sign in at id.test", thread=7)
    assert link.params["disable_notification"]
    telegram.write("!wait gate\n!say second", thread=7)
    bot.wait_prompt("!wait gate")
    assert len(telegram.texts(7, containing="server warm")) == 1


@ahead
def test_kiro_is_told_of_the_tags_again_when_it_may_have_forgotten_them(telegram, bot):
    for text in ("one", "/compact", "two", "three", "/clear", "four", "five", "/clear"):
        ask(telegram, text)
    telegram.write("!silence", thread=7)
    bot.wait_prompt("!silence")
    telegram.write("/stop", thread=7)
    telegram.answer("Stopped", thread=7)
    ask(telegram, "six")
    assert (["<send_file" in prompt for prompt in bot.prompts()]
            == [True, False, True, False, False, True, False, False, True, True])


# ---------------------------------------------------------------------------------------------------------
# The tests: a session: what belongs together, quotes, forwards, edits
# ---------------------------------------------------------------------------------------------------------


@bot_with(dict(JOIN_SECONDS=1))
@ahead
def test_albums_and_split_texts_are_one_prompt(telegram, bot):
    telegram.album(*({"kind": "document", "data": b"%d" % n, "name": f"{n}.txt"} for n in range(3)),
                   caption="three", thread=7)
    telegram.write("a" * 4096, thread=8)
    telegram.write("b" * 100, thread=8)
    together = wait_until(lambda: len(bot.prompts()) == 2 and sorted(bot.prompts()))
    assert "a" * 1900 in together[0] or "aaa" in together[0]
    assert [together[1].count(name) for name in ("three", "0.txt", "1.txt", "2.txt")] == [1, 1, 1, 1]
    telegram.answer(thread=8, when=lambda call: call.text.endswith("aa\n" + "b" * 100))
    assert len(bot.prompts()) == 2


@bot_with(dict(REST_SECONDS=60))
@ahead
def test_what_one_action_sends_is_one_prompt(telegram, bot):
    telegram.write("!say warm", thread=7)
    telegram.answer("warm", thread=7)
    bot.wait_wire("out", when=lambda entry: "loadSession" in json.dumps(entry["frame"]), count=2)
    with telegram.batch_of_updates():
        telegram.write("look at these", thread=7)
        telegram.write("elsewhere", thread=8)
        forwarded = telegram.write("/status", thread=7, forward_origin={"type": "user", "date": 1, "sender_user": BOB})
    telegram.answer("echo: elsewhere", thread=8)
    for name in ("one", "two"):
        telegram.wait_until(lambda: telegram.is_acknowledged(forwarded))
        forwarded = telegram.send_file("document", name=name, thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(forwarded))
    assert len(bot.prompts()) == 2
    telegram.write("what do you say?", thread=7)
    answer = telegram.answer("look at these", thread=7).text
    assert all(part in answer for part in ("[Forwarded from Bob]\n/status", "/one]", "/two]", "what do you say?"))
    telegram.write("typed", thread=7)
    telegram.answer("echo: typed", thread=7)
    with telegram.batch_of_updates():
        telegram.edit(telegram.write("slip", thread=7), "right")
    telegram.answer("echo: right", thread=7)
    with telegram.batch_of_updates():
        telegram.write("before the command", thread=7)
        telegram.write("/compact", thread=7)
    telegram.answer("echo: before the command", thread=7)


@ahead
def test_quotes_and_forwards_travel_with_the_question(telegram, bot):
    first = telegram.write("first", thread=7)
    answer = telegram.answer("echo: first", thread=7)
    topic = {"message_id": 7, "from": ALICE, "chat": first["chat"], "date": 1,
             "forum_topic_created": {"name": "topic", "icon_color": 1}}
    channel = {"type": "channel", "date": 1, "chat": {"id": -1, "type": "channel", "title": "News"}, "message_id": 3}
    hidden = {"type": "hidden_user", "date": 1, "sender_user_name": "Carol C."}
    with telegram.batch_of_updates():
        telegram.write("reply?", thread=7, reply_to=first)
        telegram.write("to the bot?", thread=7, reply_to=answer)
        telegram.write("quote?", thread=7, reply_to=answer, quote="a part\nof it")
        telegram.write("implicit?", thread=7, reply_to=topic)
        telegram.write("from Bob", thread=7, forward_origin={"type": "user", "date": 1, "sender_user": BOB})
        telegram.write("from Carol", thread=7, forward_origin=hidden)
        telegram.write("from a channel", thread=7, forward_origin=channel)
        telegram.send_file("document", name="a.txt", caption="with a file", forward_origin=hidden, thread=7)
    bot.wait_prompt("with a file")
    prompt = "\n\n" + "\n\n".join(bot.prompts())
    for said in ("> first\n\nreply?", "> echo: first\n\nto the bot?", "> a part\n> of it\n\nquote?",
                 "[Forwarded from Bob]\nfrom Bob", "[Forwarded from Carol C.]\nfrom Carol",
                 "[Forwarded from News]\nfrom a channel",
                 "[Forwarded from Carol C.]\nwith a file\n[File: "):
        assert f"\n\n{said}" in prompt
    assert "\n\nimplicit?" in prompt and "topic" not in prompt.partition("implicit?")[0].rpartition("quote?")[2]


@ahead
def test_a_message_edited_while_it_waits_goes_as_edited_even_after_a_crash(telegram, bot):
    running = telegram.write("!wait gate", thread=7)
    bot.wait_prompt("!wait gate")
    waiting = telegram.write("wrong words", thread=7)
    picture = telegram.send_file("photo", png(), caption="wrong caption", thread=7)
    telegram.wait_for("setMessageReaction")
    telegram.edit(waiting, "right words")
    telegram.edit(picture, "right caption")
    telegram.edit(running, "!wait another")
    telegram.answer("Your edit came too late", thread=7)
    telegram.write("/status", thread=7)
    telegram.answer("Waiting: right caption", thread=7)
    bot.kill()
    bot.start()
    prompt = bot.wait_prompt("right caption")["frame"]["params"]["prompt"][0]["text"]
    assert prompt.startswith("right words\n\nright caption\n[File: ")
    assert not any("wrong" in prompt for prompt in bot.prompts())


@ahead
def test_an_edit_counts_when_words_have_changed(telegram, bot):
    stop = telegram.write("/stop", thread=7)
    telegram.answer("Nothing is running", thread=7)
    slip, old_slip = telegram.write("!say stpo", thread=7), telegram.write("!say old", thread=7)
    telegram.answer("old", thread=7)
    settle(bot)
    bot.restart()
    telegram.write("!wait gate\n!say undisturbed", thread=7)
    bot.wait_prompt("undisturbed")
    telegram.edit(stop)
    telegram.edit(stop, "/stop", later=60)
    telegram.edit(old_slip, "/stop", later=121)
    telegram.edit(old_slip)
    first = telegram.edit(slip, "!say twice", later=3600)
    telegram.answer("Your edit came too late", thread=7)
    telegram.edit(first)
    place = telegram.post(thread=8, location={"latitude": 1, "longitude": 2, "live_period": 60})
    telegram.answer("location", thread=8)
    telegram.edit({**place, "location": {"latitude": 1.1, "longitude": 2, "live_period": 60}})
    bot.open_gate("gate")
    telegram.answer("undisturbed", thread=7)
    assert times_said(telegram, "came too late") == 1
    telegram.write("!silence", thread=7)
    bot.wait_prompt("!silence")
    telegram.edit(first, "/stop", later=110)
    telegram.answer("Stopped", thread=7)


# ---------------------------------------------------------------------------------------------------------
# The tests: Kiro's faults
# ---------------------------------------------------------------------------------------------------------

SOON_STARTED = dict(SESSION_SECONDS=1.5, MODEL_SECONDS=1.5)
SOON_ENDED = dict(STOP_SECONDS=0.5, END_SECONDS=0.5, TERM_SECONDS=0.3, AFTERWORD_SECONDS=0.4)
NO_AGENT = "Kiro has no agent 'missing' and uses 'kiro_default'. Whoever runs this bot can look at it."
AGAIN = ["Ask again", "Drop"]


def tell(telegram, text, thread, *answers, timeout=20, **fields):
    """Write into the topic, and wait for lasting messages with these texts; returns the last one's call."""
    message = telegram.write(text, thread=thread, **fields)
    return [telegram.answer(answer, thread, after=message, timeout=timeout) for answer in answers][-1]


def tell_each(telegram, text, answer, *threads):
    """The same for several topics at once, with one answer each; returns the answers' calls."""
    messages = [telegram.write(text, thread=thread) for thread in threads]
    return [telegram.answer(answer, thread, after=message) for thread, message in zip(threads, messages)]


def goes_on(telegram, *threads):
    """The next message in each of the topics is answered, and once."""
    messages = [telegram.write(f"on in {thread}", thread=thread) for thread in threads]
    for thread, message in zip(threads, messages):
        telegram.answer(f"echo: on in {thread}", thread, after=message)
    for thread, message in zip(threads, messages):
        assert len([text for text in telegram.texts(thread, after=message) if "echo: on" in text]) == 1


def offers(telegram, call):
    """The names of a message's buttons."""
    return [button["text"] for button in telegram.buttons(call)]


def half_pipes(bot):
    """The pipes of which the bot has one end."""
    names = []
    for fd in bot.proc("fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(fd))
    return [name for name in names if name.startswith("pipe:") and names.count(name) == 1]


def nothing_stays(bot, threads=10):
    """No agent, no thread but main, poll and the eight for errands, no pipe."""
    bot.wait_agents(0)
    wait_until(lambda: bot.threads() <= threads, what=lambda: f"{threads} threads rather than {bot.threads()}")
    wait_until(lambda: not half_pipes(bot), what=lambda: f"the closing of {half_pipes(bot)}")


def alive(pid):
    """Is there such a process, and not as a zombie that nobody has waited for yet?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def session_id(bot, thread):
    """The id of Kiro's session for a topic."""
    return row_of(bot, thread)["session_id"]


def session_path(bot, thread, extension="json"):
    """One of the files in which Kiro keeps a topic's session."""
    return bot.home / ".kiro" / "sessions" / "cli" / f"{session_id(bot, thread)}.{extension}"


def lose(bot, thread):
    """Remove the files of a topic's session."""
    for path in session_path(bot, thread).parent.glob(session_path(bot, thread).stem + ".*"):
        path.unlink()


def lock_by(bot, thread, pid, started_at="2020-01-01T00:00:00Z"):
    """Put a lock on a topic's session as if process `pid` had left it."""
    session_path(bot, thread, "lock").write_text(json.dumps({"pid": pid, "started_at": started_at}))


def started_agent(bot, thread):
    """A stand-in Kiro that is none of the bot's, and has the topic's session."""
    agent = subprocess.Popen(shlex.split(bot.settings["KIRO_COMMAND"]), env=bot.environment(), cwd=bot.folder,
                             stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for number, (method, params) in enumerate([
            ("initialize", {"protocolVersion": 1}),
            ("session/load", {"sessionId": session_id(bot, thread), "cwd": str(bot.folder), "mcpServers": []})]):
        agent.stdin.write(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode() + b"\n")
        agent.stdin.flush()
        bot.wait_wire("out", pid=agent.pid, when=lambda entry: entry["frame"].get("id") == number)
    return agent


class Child(program.Process):
    """A shell whose lines are kept."""

    def __init__(self, script):
        self.lines = []
        super().__init__(read_settings({}), ["sh", "-c", script], None)

    def _take(self, line):
        self.lines.append(bytes(line))
        if line == b"choke":
            raise ValueError("a line like no other")

    def _part(self):
        self.lines.append("the end")


def open_files():
    """How many pipes and the like this process has open; its sockets are of the stand-ins for the next tests."""
    def kind(number):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{number}").partition(":")[0]

    return sum(kind(number) in ("pipe", "anon_inode") for number in os.listdir("/proc/self/fd"))


def test_a_process_is_heard_to_its_last_word_and_nothing_of_it_stays():
    before = open_files()
    child = Child("cat; echo one >&2; printf 'three\nfour'; setsid sleep 60 & exec sleep 0.1")
    child.send(b"one\ntw")
    child.send(b"o\n" + 3_000_000 * b"x" + b"\n")
    child.end(patience=9)
    wait_until(child.gone.is_set)
    wait_until(lambda: child.lines[-1:] == ["the end"])
    assert child.lines[:2] == [b"one", b"two"] and len(child.lines[2]) == 3_000_000
    assert child.lines[3:] == [b"three", b"four", "the end"] and child._how_it_ended() == "exit status 0: one"
    assert not any(map(child.owns, map(int, filter(str.isdigit, os.listdir("/proc")))))
    del child
    wait_until(lambda: open_files() <= before)


@pytest.mark.parametrize("script, patience, ended", [
    ("trap '' TERM; echo ready; while :; do sleep 0.05; done", 0, "signal 9"),
    ("trap 'echo bye >&2; exit 4' TERM; echo ready; while :; do :; done", 0.1, "exit status 4: bye"),
    ("echo ready; exec sleep 60 >&-", float("inf"), "signal 15"),
    ("echo ready; cat >/dev/null; exit 5", 60, "exit status 5"),
    ("while :; do echo y; done", 0.1, "signal 15"),
], ids=["deaf to TERM", "heeds TERM", "without stdout", "heeds the end of stdin", "talks on"])
def test_a_process_ends_by_itself_or_is_ended(monkeypatch, script, patience, ended):
    monkeypatch.setattr(program, "TERM_SECONDS", 0.2 if ended == "signal 9" else 60)
    child = Child(script)
    child.send(1_000_000 * b"x")  # which hardly any of them reads, and which keeps nobody waiting
    wait_until(lambda: child.lines)
    child.end(patience)
    wait_until(lambda: "the end" in child.lines, 5)
    assert child._how_it_ended().removesuffix(": Killed") == ended  # as some shells say of what they ran


def test_what_has_no_time_left_is_killed_all_the_same():
    with subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"], stdout=subprocess.PIPE) as stubborn:
        stubborn.stdout.readline()
        program.end_processes(lambda pid: pid == stubborn.pid, 0)
        assert stubborn.wait(5) == -signal.SIGKILL


def test_a_keeper_that_fails_takes_its_process_along(caplog):
    child = Child("echo choke; sleep 60")
    wait_until(lambda: child.lines[-1:] == ["the end"])
    assert child._how_it_ended() == "signal 9" and "has failed" in caplog.text


def test_no_thread_for_a_keeper_means_no_process(monkeypatch):
    def refuse(thread, start=threading.Thread.start):
        if threading.current_thread() is not threading.main_thread():  # the stand-ins need theirs
            return start(thread)
        pids.append(int(thread.name.split()[-1]))
        raise RuntimeError("can't start new thread")

    before, pids = open_files(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            Child("sleep 60")
    assert not alive(pids[0])
    wait_until(lambda: open_files() <= before)


def test_what_cannot_be_looked_at_is_not_known(monkeypatch, tmp_path):
    """A user without a name and a home, a folder that may not be read, a session id that leads elsewhere."""
    def nobody(_):
        raise KeyError("getpwuid(): uid not found")

    lost = program.KiroRefusal({"code": -32603, "message": "Internal error", "data": "It broke"})
    facts = program.SessionFacts(ended=True, taught=True, in_sight=True)
    for home in (None, "x" * 5000, str(tmp_path)):
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", nobody)
        monkeypatch.setenv("KIRO_HOME", home) if home else monkeypatch.delenv("KIRO_HOME", raising=False)
        assert program._size_of("a-session", "json") is None and program._size_of("../../etc/passwd", "json") is None
        assert program.lock_pid("a-session") is None and not program.has_vanished("a-session", facts)
        assert not program._is_lost("a-session", facts, lost, time.monotonic())
        program.remove_lock("a-session", 1)
    (tmp_path / "sessions" / "cli").mkdir(parents=True)
    assert program.has_vanished("a-session", facts) and program._is_lost("a-session", facts, lost, time.monotonic())
    assert not program.has_vanished("a-session", facts._replace(in_sight=False))


@pytest.mark.parametrize("error, text, is_login", [
    ({"code": -32603, "message": "Internal error", "data": "Too long"}, "Too long", False),
    ({"code": -32603, "message": "Internal error", "data": {"details": "Too long"}}, "Too long", False),
    ({"code": -32603, "message": "Internal error: API Error: 400", "data": {"errorKind": "unknown"}}, "Internal error: API Error: 400",
     False),
    ({"code": -32603, "message": "It stopped", "data": {"exitCode": 1, "signal": None, "restartable": True}}, "It stopped", False),
    ({"code": -32000, "message": "Authentication required", "data": {"authMethods": [{"id": "login"}]}}, "Authentication required",
     True),
    ({"code": -32000, "message": "Who are you?"}, "Who are you?", True),
    ({"code": -32603, "message": "It failed", "data": {"errorName": "ExpiredTokenException"}}, "It failed", True),
    ({"code": -32602, "message": "Invalid params", "data": "no cwd"}, "Invalid params: no cwd", False),
    ({"code": -32603, "message": "Twice", "data": {"message": "Twice"}}, "Twice", False),
    ({"code": -32603, "message": "Internal error", "data": {"n": 1}}, "{'n': 1}", False),
    ({"message": ["odd"], "data": 7}, "7", False), ({}, "{}", False), ("just so", "just so", False),
])
def test_an_error_says_what_people_can_read(error, text, is_login):
    refusal = program.KiroRefusal(error)
    assert (str(refusal), program.is_login(refusal)) == (f"Kiro reports a problem.\n{text}", is_login)


def turn(name, script, times, offered, texts):
    """What Kiro does in a turn, how often the prompt is sent, whether it is offered again, and the topic's messages."""
    return pytest.param(script, times, offered, texts, id=name)


ENDED = "⚠️ Kiro has exited. If it does so every time, whoever runs this bot has to look at it.\n"
PROBLEM = "⚠️ Kiro reports a problem.\n"
EXITED, TROUBLED = (f"{what}Ask again; if that does not help, /new starts afresh.\n" for what in (ENDED, PROBLEM))
TURNS = [
    turn("exit status and stderr", "!exit 3 boom", 2, True, [f"{EXITED}exit status 3: boom"]),
    turn("exit without an error", "!exit 0", 2, True, [f"{EXITED}exit status 0"]),
    turn("exit with long lines on stderr",
         "!exit 1 INFO: " + 900 * "x" + r"\n\nERROR: " + 900 * "y" + r"\nit broke", 2, True,
         [f"{EXITED}exit status 1: ERROR: {193 * 'y'}; it broke"]),
    turn("exit with colours", "!exit 1 \x1b[1;31mERROR\x1b[0m it \x1b[1mbroke\x1b[m", 2, True,
         [f"{EXITED}exit status 1: ERROR it broke"]),
    turn("killed", "!kill", 2, True, [f"{EXITED}signal 9"]),
    turn("killed after a thought", "!thought hm\n!kill", 2, True, [f"{EXITED}signal 9"]),
    turn("killed after text", "!say half\n!kill", 1, True, ["half", f"{EXITED}signal 9"]),
    turn("exit after text",
         "!say half\n!exit 1 boom", 1, True, ["half", f"{EXITED}exit status 1: boom"]),
    turn("killed while a tool runs",
         "!tool execute Running: make\n!kill", 1, True, [f"{EXITED}signal 9"]),
    turn("stdout closed", "!say half\n!close_stdout\n!silence", 1, True, ["half", "⚠️ Kiro has exited"]),
    turn("silent", "!silence", 1, True, ["⚠️ Kiro said nothing for 2 s, so I ended it. Ask again"]),
    turn("silent after text", "!say half\n!silence", 1, True, ["half", "⚠️ Kiro said nothing for 2 s, so I ended it. Ask again"]),
    turn("a line of 33 MB", "!bigline 33", 1, True, [f"{ENDED}a line of more than 32 MB"]),
    turn("error", "!error -32603 The model 'X' is not available", 1, True, [f"{TROUBLED}The model 'X' is not available"]),
    turn("error in an object", "!error_object -32603 Throttled", 1, True,
         [f"{PROBLEM}It may pass. Wait a little, then ask again.\nThrottled"]),
    turn("error after text", "!say half\n!error -32603 Too long", 1, True, ["half", f"{TROUBLED}Too long"]),
    turn("nothing but a thought", "!thought hm", 1, False, ["Kiro has finished without saying anything."]),
    turn("nothing but a rate limit", "!rate_limit Too many requests", 1, False, ["Too many requests"]),
    turn("turn_end", "!say all\n!turn_end", 1, False, ["all"]),
    turn("turn_end and nothing else", "!turn_end", 1, False, ["Kiro has finished without saying anything."]),
    turn("turn_end and exit", "!say all\n!turn_end exit", 1, False, ["all"]),
    turn("interrupted after text",
         "!say so\n!tool read a.txt\n!interrupted", 1, False,
         ["so\n\nTool uses were interrupted, waiting for the next user prompt"]),
    turn("interrupted", "!interrupted", 1, False, ["Tool uses were interrupted, waiting for the next user prompt"]),
    turn("discarded text", "!say wrong\n!discard\n!say right", 1, False, ["right"]),
    turn("discarded after a tool", "!say a\n!tool read a.txt\n!say wrong\n!discard\n!say b", 1, False, ["a\n\nb"]),
    turn("discarded by a subagent",
         '!say kept\n!raw {"jsonrpc":"2.0","method":"_kiro.dev/session/update","params":{"sessionId":"of-a-subagent",'
         '"update":{"sessionUpdate":"stream_discarded"}}}', 1, False, ["kept"]),
    turn("retry warning", "!retry_warning\n!say after all", 1, False, ["after all"]),
    turn("unknown requests",
         "!request fs/write_text_file\n!request _vendor/thing", 1, False,
         ["fs/write_text_file: -32601\n_vendor/thing: -32601"]),
    turn("junk", "!junk\n!say ok", 1, False, ["ok"]),
    turn("a list as stop reason", '!say ok\n!stop_reason ["end_turn"]', 1, False, ["ok"]),
    turn("an object as stop reason", '!say ok\n!stop_reason {"a": 1}', 1, False, ["ok"]),
    turn("odd usage",
         '!raw {"jsonrpc":"2.0","method":"session/update",'
         '"params":{"update":{"sessionUpdate":"usage_update","used":1,"size":"x"}}}\n!say ok', 1, False, ["ok"]),
    turn("a line of 10 MB", "!bigline 10\n!say ok", 1, False, ["ok"]),
    turn("300 kB on stderr", "!stderr 300\n!say ok", 1, False, ["ok"]),
    turn("another session's and late words",
         "!update_other_session no\n!say mine\n!late no\n!late_ask", 1, False, ["mine"]),
    turn("half surrogates", "!surrogates", 1, False, ["😀"]),
    turn("login of an MCP server",
         "!oauth https://tracker.test/login\n!say ok", 1, False,
         ["The MCP server tracker wants you to sign in at tracker.test:\nhttps://tracker.test/login", "ok"]),
    turn("compaction", "!compaction\n!say ok", 1, False, ["ok"]),
    turn("nothing but a compaction", "!compaction", 1, False, ["The conversation was compacted."]),
    turn("odd compaction",
         '!raw {"jsonrpc":"2.0","method":"_kiro.dev/compaction/status","params":{"status":{"type":["started"]}}}\n!say ok',
         1, False, ["ok"]),
    turn("failed compaction",
         '!raw {"jsonrpc":"2.0","method":"_kiro.dev/compaction/status",'
         '"params":{"status":{"type":"failed","error":"too short"}}}', 1, False,
         ["⚠️ The conversation could not be compacted; /new starts afresh.\ntoo short"]),
    turn("bad agent configuration",
         '!raw {"jsonrpc":"2.0","method":"_kiro.dev/agent/config_error","params":{"error":"no such field"}}\n!say ok',
         1, False, ["Kiro can't read an agent's configuration. Whoever runs this bot has to look at it.\nno such field", "ok"]),
    turn("refusal", "!say no\n!stop_reason refusal", 1, False, ["no", "ℹ️ Kiro declined to go on (refusal). Ask in other words"]),
    turn("token limit", "!say cut\n!stop_reason max_tokens", 1, False, ["cut", "ℹ️ The answer was cut off"]),
    turn("cancelled by Kiro", "!stop_reason cancelled", 1, True, ["ℹ️ Kiro ended this turn early (cancelled)."]),
    turn("a process holds the pipes", "!spawn pipes\n!say ok", 1, False, ["ok"]),
    turn("a process in its own session", "!spawn setsid\n!say ok", 1, False, ["ok"]),
    turn("killed and a process holds the pipes",
         "!spawn setsid pipes\n!say half\n!kill", 1, True, ["half", f"{EXITED}signal 9"]),
]


def elicit(message, properties=None, required=(), **more):
    """The directive that asks for these fields, or what else is said."""
    if properties is not None:
        more["requestedSchema"] = {"type": "object", "properties": properties, "required": list(required)}
    return f"!elicit {json.dumps({'message': message, **more})}\n"


RECURSIVE = {"$ref": "#"}
for _ in range(20):
    RECURSIVE = {"type": "object", "properties": {"a": RECURSIVE}}
SECRETS, ODD = "this chat is no place for secrets", "such a question can't be shown"
DECLINED = [
    (SECRETS, elicit("p", {"x": {"type": "string"}, "user_password": {"type": "string"}})),
    (SECRETS, elicit("p", {"x": {"type": "string", "title": "GitHub Token"}})),
    (SECRETS, elicit("p", {"apiKey": {"type": "string"}})),
    (ODD, elicit("p", {"x": {"type": "object", "properties": {"a": {"type": "string"}}}})),
    (ODD, elicit("p", {"x": RECURSIVE})),
    (ODD, elicit("p", {"x": {"type": "array", "items": {}}})),
    (ODD, elicit("p", {"x": 7, "y": None})),
    (ODD, elicit("p", mode="telepathy")), (ODD, elicit("p", mode=[1])),
    *((f"{url} is no plain https address", elicit("p", mode="url", url=url)) for url in (
        "http://id.test/", "https://user:password@id.test/", "https://id.test@evil.test/", "javascript:alert(1)",
        "https://id.test/ x", "https://localhost/", None, ["https://id.test/"])),
]
TURNS += [turn(f"declined {n}", form + "!say ok", 1, False,
               ["❓ Kiro asks: p\nI declined: " + why, "elicited: decline null\nok"]) for n, (why, form) in enumerate(DECLINED)]


@pytest.fixture(scope="session", autouse=True)
def turns(request, orderly_run, tmp_path_factory):
    """Lets Kiro do all that is asked for at once from the run's start on, each in a topic of its own: (telegram, bot,
    topics by script)."""
    cases = [item.callspec.params["script"] for item in wanted(request)]
    if not cases:
        yield
        return
    threads = {script: thread for thread, script in enumerate(cases, 1)}
    with StandInTelegram() as telegram:
        bot = RunningBot(tmp_path_factory.mktemp("turns"), telegram, WARM_SECONDS=0, SILENCE_SECONDS=2, MAX_PROCESSES=6)
        bot.hurry(**SOON_ENDED).start()
        for script, thread in threads.items():
            telegram.write(script, thread=thread)
        yield telegram, bot, threads
        nothing_stays(bot)
        bot.close()


@pytest.mark.parametrize("script, times, offered, texts", TURNS)
def test_whatever_kiro_does_in_a_turn_is_answered_once_and_the_topic_goes_on(turns, script, times, offered, texts):
    telegram, bot, threads = turns
    thread = threads[script]
    last = telegram.answer(texts[-1], thread, timeout=20)
    assert offers(telegram, last) == (AGAIN if offered else [])
    told = telegram.texts(thread)
    assert len(told) == len(texts) and all(map(str.startswith, told, texts))
    assert [prompt.partition("\n[About")[0] for prompt in bot.prompts()].count(script) == times
    goes_on(telegram, thread)
    assert len(telegram.texts(thread)) == len(texts) + 1


@bot_with(WARM_SECONDS=0)
def test_ask_again_after_a_crash_asks_once(telegram, bot):
    text = "!say half\n!exit 1\n"
    card = tell(telegram, text, 7, "half", "⚠️ Kiro has exited")
    for _ in range(3):  # three presses in a row are one
        telegram.press(card, "Ask again", data=telegram.buttons(card)[0]["callback_data"])
    second = telegram.answer("⚠️ Kiro has exited", thread=7, after=card)
    telegram.wait_for("answerCallbackQuery", count=3)
    telegram.press(second, "Drop")
    telegram.wait_for("editMessageText", containing="Dropped", after=second)
    assert len(bot.prompts()) == 2 and not telegram.buttons(card) and not telegram.buttons(second)
    assert telegram.texts(7).count("half") == 2
    goes_on(telegram, 7)
    nothing_stays(bot)


@bot_with(dict(REPLACED_SECONDS=2), WARM_SECONDS=0, MAX_PROCESSES=1)
@ahead
def test_a_missing_kiro_is_told_and_found_again(telegram, bot):
    program, away = bot.folder / "kiro", bot.folder / "away"
    program.write_text(f"#!/bin/sh\nexec {KIRO_COMMAND}\n")
    program.chmod(0o700)
    bot.restart(KIRO_COMMAND="./kiro acp")
    program.rename(away)
    message = telegram.write("while it is being updated", thread=1)
    telegram.wait_for(DRAFT, thread=1)
    away.chmod(0o600)
    away.rename(program)  # still not executable
    with open(program, "r+b"):
        program.chmod(0o700)  # and still written to
        time.sleep(0.2)
    assert telegram.answer("echo: while", thread=1, after=message)
    program.rename(away)
    telegram.write("to be stopped", thread=1)
    telegram.stop(telegram.wait_for(DRAFT, thread=1, after=telegram.mark()))
    telegram.answer("⏹ Stopped before Kiro began", thread=1)
    card = tell(telegram, "hello", 1, ": No such file or directory")
    assert card.text.startswith("⚠️ Kiro could not be started. Whoever runs this bot has to look at KIRO_COMMAND")
    away.rename(program)
    telegram.press(card, "Ask again")
    telegram.answer("echo: hello", thread=1)
    bot.workspace(2).write_text("a file where the folder should be")
    card = tell(telegram, "hello", 2, f"\n{bot.workspace(2)}: File exists")
    assert card.text.startswith("⚠️ This topic's folder can't be used.")
    assert offers(telegram, card) == AGAIN
    bot.workspace(2).unlink()
    goes_on(telegram, 1, 2)
    nothing_stays(bot)


TRANSIENT = [
    {"load": {"error": -32603, "data": "The request was throttled by the service"}},
    {"load": {"error": -32603, "data": "Failed to start session: unknown error"}},
    {"load": {"error": -32603, "data": "Failed to load session: MCP server 'tracker' not found"}},
    {"load": {"error": -32603, "data": {"details": "ExpiredTokenException"}}},
    {"load": {"exit": 0}},
    {"load": {"kill": True}},
    {"load": {"hang": True}},
]


def keep_their_sessions(telegram, bot):
    """Topic 7 has one trouble after the other with its session, 8 meanwhile the one that takes long; both keep theirs."""
    tell_each(telegram, "hello", "echo: hello", 7, 8)
    sessions = session_id(bot, 7), session_id(bot, 8)
    settle(bot)
    *quick, slow = TRANSIENT
    bot.habits(topics={8: slow})
    message = telegram.write("and now", thread=8)
    for habits in quick:
        bot.habits(topics={7: habits, 8: slow})
        tell(telegram, "and now", 7, "⚠️ ")
        assert session_id(bot, 7) == sessions[0], habits
    telegram.answer("⚠️ ", 8, after=message)
    assert session_id(bot, 8) == sessions[1]


@bot_with(SOON_STARTED, WARM_SECONDS=0, START_SECONDS=2, SILENCE_SECONDS=2)
@ahead
def test_trouble_at_load_does_not_throw_a_session_away(telegram, bot):
    keep_their_sessions(telegram, bot)
    bot.habits(load={"error": -32603, "data": "You are not logged in"})
    away = session_path(bot, 7).parent.with_name("away")
    session_path(bot, 7).parent.rename(away)  # as if it were lost, too
    card = tell(telegram, "and now", 7, "kiro-cli login")
    shutil.rmtree(session_path(bot, 7).parent)
    away.rename(session_path(bot, 7).parent)
    bot.habits()
    assert offers(telegram, card) == AGAIN
    tell_each(telegram, "!recall", "before: hello", 7, 8)
    nothing_stays(bot)


@bot_with(SOON_STARTED, WARM_SECONDS=0, START_SECONDS=2, SILENCE_SECONDS=2, MAX_PROCESSES=4)
@ahead
def test_a_lost_session_is_replaced_and_the_loss_is_told(telegram, bot):
    for faults in (
            {thread: {"unknown_session": way} for thread, way in enumerate(["error", "exit", "hang", "accept"], 1)},
            {thread: {"load": {"error": code, "data": "Resource not found: session", "times": 1}}
             for thread, code in enumerate([-32002, -32600, -32603], 1)}):
        tell_each(telegram, "hello", "echo: hello", *faults)
        bot.wait_agents(0)
        for thread in faults:
            lose(bot, thread)
        bot.habits(topics=faults)
        before = telegram.mark()
        tell_each(telegram, "who am I", "echo: who am I", *faults)
        for thread in faults:
            [told] = telegram.texts(thread, after=before, containing="⚠️")
            assert told.startswith("⚠️ Kiro no longer has this topic's session: its history is gone")
    bot.habits()
    goes_on(telegram, *range(1, 5))
    tell(telegram, "!say half\n!kill", 9, "half", "⚠️")
    lose(bot, 9)
    tell(telegram, "!recall", 9, "0 before")
    assert not telegram.find(containing="history is gone", thread=9)  # no turn of it had ended
    nothing_stays(bot)


@bot_with({**SOON_STARTED, "REFUSED_AGAIN_SECONDS": 2}, WARM_SECONDS=0, SILENCE_SECONDS=2)
@ahead
def test_a_session_out_of_sight_is_lost_only_when_that_is_plain(telegram, bot):
    """Kiro keeps its sessions elsewhere, while the folder where they might be is here, too."""
    (bot.home / ".kiro" / "sessions" / "cli").mkdir(parents=True)
    bot.restart(KIRO_COMMAND=f"env KIRO_HOME={bot.control}/elsewhere {KIRO_COMMAND}")
    keep_their_sessions(telegram, bot)
    session = session_id(bot, 7)
    bot.habits(replay="after")
    tell_each(telegram, "!recall", "before: hello", 7, 8)
    none_found = {"error": -32603, "data": {"details": "No previous sessions found for this project."}}
    bot.habits(load=none_found)
    tell(telegram, "one", 7, f"{TROUBLED}No previous sessions found")
    refused = time.monotonic()
    tell(telegram, "two", 7, f"{PROBLEM}This session refuses every message in the same way.")  # too soon: the same trouble, perhaps
    wait_until(lambda: time.monotonic() > refused + 2.1)
    tell(telegram, "three", 7, f"its history is gone, a new one has begun. The folder is as it was.\nThe old session: {session}",
         "echo: three")
    bot.habits(load={"error": -32603, "message": "Session not found", "data": {"sessionId": session}, "times": 1})
    tell(telegram, "four", 7, "its history is gone", "echo: four")
    assert len(telegram.find(containing="history is gone")) == 2
    nothing_stays(bot)


@bot_with(dict(STOP_SECONDS=0.2, TERM_SECONDS=1), WARM_SECONDS=0)
@ahead
def test_what_a_dying_process_still_writes_is_history(telegram, bot):
    bot.habits(cancel={"hang": True}, ignore_term=True, ignore_stdin_end=True)
    telegram.write("!say important\n!wait gate", thread=7)
    bot.wait_prompt("important")
    telegram.write("/stop", thread=7)
    telegram.answer("Stopped", thread=7)
    bot.open_gate("gate")
    bot.habits()
    assert ask(telegram, "!recall").startswith("2 before: !say important")


@bot_with(SOON_STARTED, WARM_SECONDS=0, START_SECONDS=2, SILENCE_SECONDS=2)
@ahead
def test_a_session_of_which_nothing_was_kept_is_replaced(telegram, bot):
    ways = dict(enumerate(["error", "exit", "hang"], 1))
    bot.habits(topics={thread: {"unknown_session": way} for thread, way in ways.items()})
    tell_each(telegram, "/new", "A new session", *ways)
    assert {call.text for call in tell_each(telegram, "hello", "echo: hello", *ways)} == {"echo: hello"}
    tell_each(telegram, "/new", "A new session", *ways)
    for thread, way in ways.items():
        telegram.write(f"!say hm {way}\n!silence", thread=thread)
    for way in ways.values():
        bot.wait_prompt(f"hm {way}")
    tell_each(telegram, "/stop", "⏹ Stopped.", *ways)
    tell_each(telegram, "who am I", "echo: who am I", *ways)
    for thread in ways:
        assert telegram.texts(thread)[-2].startswith("ℹ️ Kiro kept nothing of what was said here")
    nothing_stays(bot)


@bot_with(WARM_SECONDS=0)
@ahead
def test_a_lock_is_removed_when_its_process_is_dead_and_respected_when_not(telegram, bot):
    tell(telegram, "hello", 7, "echo: hello")
    bot.wait_agents(0)
    dead = subprocess.Popen(["true"])
    dead.wait()
    zombie, sleeper = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"], env=bot.environment())
    for number, process in enumerate([dead, zombie, sleeper]):  # the last: the pid was given to another
        lock_by(bot, 7, process.pid)
        tell(telegram, f"!recall {number}", 7, "before: hello")
    assert sleeper.poll() is None
    sleeper.kill(), sleeper.wait(), zombie.wait()
    session_path(bot, 7, "lock").touch()  # a kill or a full disk has cut it off: it names nobody
    tell(telegram, "!recall 3", 7, "before: hello")
    stranger = started_agent(bot, 7)
    lock_by(bot, 7, stranger.pid)  # it runs as Kiro: when it began, and what the clock says, does not matter
    card = tell(telegram, "!recall again", 7,
                f"open in another program (process {stranger.pid}). Close it there, then ask again.")
    assert offers(telegram, card) == AGAIN and stranger.poll() is None
    stranger.communicate()
    telegram.press(card, "Ask again")
    telegram.answer("before: hello", thread=7)
    nothing_stays(bot)


@bot_with(dict(LOCK_SECONDS=0.2), WARM_SECONDS=0)
@ahead
def test_a_lock_whose_pid_means_nothing_here_is_not_touched(telegram, bot):
    """Kiro in a container, or on another machine: there its pid may be another's here, or nobody's."""
    bot.habits(lock_pid=999_999_999)
    tell(telegram, "hello", 7, "echo: hello")
    tell(telegram, "!say half\n!kill", 7, "half", "⚠️ Kiro has exited")
    lock = session_path(bot, 7, "lock")
    bot.habits(lock_pid=999_999_998)
    card = tell(telegram, "again", 7, f"remove the lock.\nprocess 999999999: {lock}")
    assert lock.exists() and offers(telegram, card) == AGAIN
    tell(telegram, "/new", 7, "A new session")
    goes_on(telegram, 7)
    nothing_stays(bot)


@pytest.mark.parametrize("command, line, sign", [
    ("kiro-cli acp", "/usr/bin/kiro-cli-chat acp", True), ("/opt/agents/codex acp", "node /opt/agents/codex acp", True),
    ("/opt/agents/codex acp", "/usr/bin/kiro-cli acp", True), ("python3.11 -m agent acp", "python3.11 -m http.server", False),
    ("ssh -t dev /proc/x acp", "sleep /dev/null /proc/1", False), ("docker exec -i / sh", "/bin/sh -c sleep", False),
])
def test_what_shows_that_a_process_is_kiro(command, line, sign):
    settings = read_settings({"KIRO_COMMAND": command})
    process = subprocess.Popen([sys.executable, "-c", "import os; os.execvp('sleep', ['sleep ' + %r, '9'])" % line])
    try:
        wait_until(lambda: b"sleep " in Path(f"/proc/{process.pid}/cmdline").read_bytes()[:6])
        assert program.runs_as_kiro(process.pid, settings) is sign
    finally:
        process.kill(), process.wait()


@bot_with(WARM_SECONDS=0)
@bot_with(WARM_SECONDS=0)
@ahead
def test_the_next_message_waits_for_the_dying_process_to_free_the_lock(telegram, bot):
    bot.habits(slow_exit=0.2, two_processes=True)
    tell(telegram, "hello", 7, "echo: hello")
    tell(telegram, "!recall", 7, "2 before: hello")
    first, second = [entry["t"] for entry in bot.wire("exit")][:1] + [bot.wait_wire("in", "session/load")["t"]]
    assert first < second and len(bot.wire("in", "session/load")) == 1
    nothing_stays(bot)


@pytest.mark.parametrize("stubborn", [False, True])
@bot_with(SOON_ENDED, WARM_SECONDS=0)
@ahead
def test_orphans_of_a_killed_bot_free_their_session(telegram, bot, stubborn):
    bot.habits(two_processes=True, ignore_stdin_end=stubborn, ignore_term=stubborn)
    telegram.write("!spawn setsid\n!say half\n!wait never", thread=7)
    bot.wait_wire("out", when=lambda entry: "half" in str(entry["frame"]))
    telegram.write("what came while Kiro worked", thread=7)
    telegram.wait_for("setMessageReaction")
    left = bot.agents()
    bot.kill()
    assert len(left) == 3
    if stubborn:
        session_path(bot, 7, "lock").unlink()  # it is no lock by which orphans are known
    else:
        bot.wait_agents(1)  # the others notice it
    bot.habits()
    bot.start(wait=False)
    telegram.answer("I was interrupted while working on", thread=7)
    assert not [pid for pid in left if alive(pid)]
    telegram.answer("echo: what came while Kiro worked", thread=7)
    goes_on(telegram, 7)
    nothing_stays(bot)


# How Kiro fails before there is a turn, what the topic hears, and whether the prompt is offered again.
STARTS = [
    ({"start": {"stderr": "error: You are not logged in, please log in with kiro-cli login", "exit": 1}},
     "kiro-cli login --use-device-flow", True),
    ({"start": {"stderr": "error: You are not logged in", "exit": 0}}, "kiro-cli login --use-device-flow", True),
    ({"start": {"stderr": "error: unexpected argument '--agent-engine'", "exit": 2}},
     "exit status 2: error: unexpected argument", True),
    ({"start": {"kill": True, "times": 1}}, "echo: hello", False),
    ({"start": {"junk": True, "big_line": 600}}, "echo: hello", False),
    ({"initialize": {"exit": 0, "times": 1}}, "echo: hello", False),
    ({"initialize": {"error": -32603, "data": {"message": "no such engine"}}}, f"{TROUBLED}no such engine", True),
    ({"new": {"exit": 0}}, f"{EXITED}exit status 0", True),
    ({"new": {"error": -32000, "message": "Authentication required"}}, "kiro-cli login --use-device-flow", True),
    ({"auth_methods": [{"id": "x", "description": "run agent login"}, 17], "new": {"error": -32000, "message": "Who?"}},
     f"{PROBLEM}It is not logged in. On the server, as the bot's user: run agent login\nWho?", True),
    ({"new": {"junk": True, "big_line": 10000, "stderr": "x" * 300_000}}, "echo: hello", False),
    ({"new": {"babble": 25_000}}, "echo: hello", False),
    ({"agent_not_found": True}, NO_AGENT, False),
    ({"new": {"hang": True, "times": 1}}, "echo: hello", False),
    ({"start": {"hang": True, "times": 1}}, "echo: hello", False),
    ({"initialize": {"hang": True}},
     "⚠️ Kiro did not answer in time.\nAsk again; if that does not help, /new starts afresh.\ninitialize: no answer within 2 s", True),
]


@bot_with(SOON_STARTED | SOON_ENDED, WARM_SECONDS=0, START_SECONDS=2, SILENCE_SECONDS=2, MAX_PROCESSES=7)
@ahead
def test_a_kiro_that_does_not_end_or_does_not_start_is_dealt_with_in_time(telegram, bot):
    """Stdin's end, then TERM, then KILL; and a cancel that is ignored. Meanwhile, whatever keeps Kiro from starting."""
    bot.habits(two_processes=True, ignore_stdin_end=True, ignore_term=True)
    tell(telegram, "!spawn setsid pipes\n!say the end", 101, "the end")
    answered = time.monotonic()
    starts = dict(enumerate(STARTS, 1))
    bot.habits(topics={102: {"cancel": {"hang": True}}} | {thread: habits for thread, (habits, *_) in starts.items()})
    telegram.write("!recall", thread=101)
    telegram.write("!chunks 100 9 0.1", thread=102)
    bot.wait_wire("start", count=3)
    bot.wait_prompt("!chunks")
    telegram.stop(telegram.wait_for(DRAFT, thread=102))
    pressed = time.monotonic()
    for thread in starts:
        telegram.write("hello", thread=thread)
    for thread, (habits, answer, offered) in starts.items():
        last = telegram.answer(answer, thread)
        assert offers(telegram, last) == (AGAIN if offered else []), habits
    bot.habits()
    stopped = telegram.answer("⏹ Stopped.", thread=102)
    recalled = telegram.answer("2 before: !spawn", thread=101, timeout=15)
    assert stopped.time - pressed < 5 and recalled.time - answered < 9
    goes_on(telegram, 101, 102, *range(1, len(STARTS) + 1))
    nothing_stays(bot)


@bot_with(SILENCE_SECONDS=2, START_SECONDS=20)
@ahead
def test_a_kiro_that_waits_in_a_queue_before_it_starts_is_given_time(telegram, bot):
    bot.habits(start={"delay": 2.2, "times": 1})
    assert ask(telegram, "!say at last") == "at last"
    assert len(bot.wire("start")) == 1


# As srun and ssh do: late, another pid, HOME, environment.
ELSEWHERE = """
echo "srun: job 17 queued and waiting for resources" >&2
while ! [ -e "$KIRO_STAND_IN/resources" ]; do sleep 0.05; done
env -i PATH="$PATH" PYTHONPATH="$PYTHONPATH" HOME="$KIRO_STAND_IN" KIRO_STAND_IN="$KIRO_STAND_IN" "$@"
"""


@bot_with(dict(SLOW_START_SECONDS=0.1, FRAME_SECONDS=0.02), WARM_SECONDS=0)
@ahead
def test_a_wrapper_may_run_kiro_on_another_machine(telegram, bot):
    bot.control_file("wrapper", ELSEWHERE)
    bot.restart(KIRO_COMMAND=f"sh {bot.control}/wrapper {KIRO_COMMAND}")
    telegram.write("!say first", thread=7)
    telegram.wait_for("sendMessageDraft", containing="srun: job 17 queued and waiting for resources", thread=7)
    tell(telegram, "/status", 7, "srun: job 17 queued")
    tell(telegram, "/stop", 7, "⏹ Stopped before Kiro began")
    telegram.write("!say second", thread=7)
    bot.open_gate("resources")
    telegram.answer("second", 7)
    message = telegram.write("!say so far\n!silence", thread=7)
    telegram.wait_for("sendMessageDraft", containing="so far", thread=7, after=message)
    tell(telegram, "/stop", 7, "⏹ Stopped.")
    message = telegram.write("!say cut off\n!silence", thread=7)
    telegram.wait_for("sendMessageDraft", containing="cut off", thread=7, after=message)
    bot.kill()
    bot.start()
    telegram.answer("I was interrupted", 7)
    assert "second" in ask(telegram, "!recall")
    assert not telegram.find(containing="history is gone") and not list(bot.home.glob(".kiro/sessions/cli/*"))
    nothing_stays(bot)


@bot_with(SOON_ENDED | dict(DEAF_SECONDS=1), WARM_SECONDS=0, SILENCE_SECONDS=2)
@ahead
def test_a_deaf_kiro_blocks_nobody(telegram, bot):
    deaf = {"new": {"deaf": True}, "load": {"deaf": True}}
    bot.habits(topics={1: {"new": {"deaf": True, "times": 1}}, 3: deaf})
    telegram.send_file("photo", png() + bytes(3_000_000), thread=1, caption="look")
    telegram.send_file("document", bytes(5_000_000), name="big.bin", thread=3)
    bot.wait_wire("in", "session/new", count=2)
    tell(telegram, "/status", 1, "Session: ")
    goes_on(telegram, 2)
    telegram.answer("echo: look", thread=1)  # a process that reads nothing has done nothing: asked once more
    assert len(bot.wire("in", "session/prompt", when=lambda entry: "look" in str(entry))) == 1
    card = telegram.answer("⚠️ Kiro does not read what it is sent", thread=3)
    assert offers(telegram, card) == AGAIN
    bot.habits()
    goes_on(telegram, 1, 3)
    nothing_stays(bot)


def warm_one(bot, thread):
    """Wait for the warm process of a topic; returns its pid."""
    load = bot.wait_wire("in", "session/load",
                         when=lambda entry: entry["frame"]["params"]["sessionId"] == session_id(bot, thread))
    bot.wait_wire("out", pid=load["pid"], when=lambda entry: entry["frame"].get("id") == load["frame"]["id"])
    return load["pid"]


@bot_with(SOON_ENDED | dict(DEAF_SECONDS=1), SILENCE_SECONDS=2, MAX_PROCESSES=10)
@ahead
def test_a_warm_process_that_is_dead_deaf_or_logged_out_is_replaced(telegram, bot):
    bot.habits(topics={2: {"load": {"deaf": True}}})
    tell_each(telegram, "hello", "echo: hello", 1, 2, 3)
    os.kill(warm_one(bot, 1), signal.SIGKILL)
    warm_one(bot, 2), warm_one(bot, 3)
    bot.habits()
    tell_each(telegram, "!recall", "2 before: hello", 1, 2)
    bot.habits(prompt={"error": -32603, "data": "ExpiredTokenException", "times": 1})
    telegram.write("!ask Running: make", thread=3)
    telegram.press(telegram.answer("make", thread=3), "Yes")
    telegram.answer("permission: allow_once", thread=3)
    bot.habits(load={"hang": True})
    tell(telegram, "hello", 4, "echo: hello")
    bot.habits()
    goes_on(telegram, 1, 2, 3, 4)
    assert not telegram.find(containing="⚠️")


@bot_with(dict(MODEL_SECONDS=1, REQUEST_PATIENCE=2), WARM_SECONDS=0, SILENCE_SECONDS=2)
@ahead
def test_a_model_that_kiro_does_not_take_is_told(telegram, bot):
    tell(telegram, "hello", 7, "echo: hello")
    tell(telegram, "/model claude-sonnet-4", 7, "Model for this topic")
    bot.habits(set_model={"hang": True})
    tell(telegram, "one", 7,
         "⚠️ The model may not be claude-sonnet-4; /model offers others. Kiro did not answer in time.", "echo: one")
    bot.habits(set_model={"talk": True})
    tell(telegram, "and", 7, "session/set_model: no answer within", "echo: and")
    bot.habits(set_model={"error": -32603, "data": "Not for you"})
    tell(telegram, "two", 7,
         "⚠️ The model may not be claude-sonnet-4; /model offers others. Kiro reports a problem.\nNot for you", "echo: two")
    bot.habits(models=["auto", "other"])
    tell(telegram, "!model", 7,
         "The model claude-sonnet-4 is no longer offered; this topic is back to Kiro's own choice.", "model: auto")
    assert row_of(bot)["model"] == "auto"
    bot.habits()
    goes_on(telegram, 7)
    nothing_stays(bot)


@bot_with(WARM_SECONDS=0)
def test_an_agent_that_loads_late_or_never_keeps_the_conversation_straight(telegram, bot):
    bot.habits(replay="after")
    tell(telegram, "hello", 1, "echo: hello")
    assert tell(telegram, "again", 1, "echo:").text == "echo: again"
    bot.habits(load_session=False)
    tell(telegram, "hello", 2, "echo: hello")
    tell(telegram, "!recall", 2, "This agent can't reload sessions: each message starts without the history.", "0 before")
    tell(telegram, "!recall", 2, "0 before")
    assert len(telegram.find(containing="can't reload", thread=2)) == 1
    nothing_stays(bot)


@bot_with(WARM_SECONDS=0)
def test_a_kiro_that_dies_with_an_open_question_takes_it_along(telegram, bot):
    telegram.write("!ask Running: make", thread=7)
    question = telegram.answer("make", thread=7)
    os.kill(bot.wire("in", "session/prompt")[0]["pid"], signal.SIGKILL)
    telegram.answer(f"{EXITED}signal 9", thread=7)
    telegram.wait_for("editMessageText", containing="Refused")
    assert not telegram.buttons(question)
    goes_on(telegram, 7)
    nothing_stays(bot)


@bot_with(dict(TERM_SECONDS=10), WARM_SECONDS=0, MAX_PROCESSES=1)
def test_a_zombie_that_nobody_waits_for_keeps_no_place(telegram, bot):
    tell(telegram, "!zombie\n!say left", 7, "left")
    tell(telegram, "next", 8, "echo: next", timeout=5)
    parent, = bot.wait_agents(1)
    os.kill(parent, signal.SIGKILL)


@bot_with(SOON_ENDED, WARM_SECONDS=0)
@ahead
def test_a_process_left_in_the_group_without_our_mark_is_ended(telegram, bot):
    program = bot.folder / "kiro"
    program.write_text(f"#!/bin/sh\nenv -i KIRO_STAND_IN=$KIRO_STAND_IN sleep 600 & echo $! > {bot.control}/left\n"
                       f"exec {KIRO_COMMAND}\n")
    program.chmod(0o700)
    bot.restart(KIRO_COMMAND="./kiro acp")
    tell(telegram, "hello", 7, "echo: hello")
    left = int((bot.control / "left").read_text())
    try:
        wait_until(lambda: not alive(left), 3, "the end of the left process")
        nothing_stays(bot)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------
# The tests: Telegram's faults
# ---------------------------------------------------------------------------------------------------------

# Pauses that are a hundredth of the real ones, so that an outage of a second is one of minutes.
HASTY = dict(RETRY_AT_MOST=0.1, CONFLICT_SECONDS=(0.05, 0.05), FLOOD_SECONDS=0.2, TIMEOUT=(1, 1),
             JOURNAL_RETRY_SECONDS=0.3)


@pytest.fixture(scope="session", autouse=True)
def thrown_out(request, orderly_run, tmp_path_factory):
    """A bot that meets another one's poll; it is patient for longer than the other tests take: (bot, telegram)."""
    if not wanted(request):
        yield
        return
    with StandInTelegram() as telegram:
        telegram.fault("getUpdates", status=409, times=2)
        bot = RunningBot(tmp_path_factory.mktemp("thrown_out"), telegram).start()
        telegram.write("after the other bot", thread=7)
        yield bot, telegram
        bot.close()


@pytest.fixture(scope="session", autouse=True)
def limited(request, orderly_run, tmp_path_factory):
    """A bot whose first polls are limited; it waits while other tests run: (bot, telegram)."""
    if not wanted(request):
        yield
        return
    with StandInTelegram() as telegram:
        telegram.fault("getUpdates", status=429, retry_after=1)
        telegram.fault("getUpdates", status=429)
        bot = RunningBot(tmp_path_factory.mktemp("limited"), telegram).hurry(**HASTY).start(wait=False)
        telegram.write("!say hello", thread=7)
        yield bot, telegram
        bot.close()


def times_said(telegram, text):
    """How many lasting messages have this text in them."""
    return len(telegram.find(None, containing=text))


def wait_state(bot, state, count=1):
    """Wait until so many messages are in this state of the journal."""
    query = "SELECT count(*) AS n FROM inbox WHERE state = ?"
    wait_until(lambda: bot.database(query, state)[0]["n"] == count, 10,
               lambda: f"{count} {state}: {bot.database('SELECT * FROM inbox')}")


@bot_with(HASTY)
@ahead
def test_an_outage_delays_messages_and_loses_none(telegram, bot):
    telegram.write("!wait gate\n!say first", thread=7)
    bot.wait_prompt("first")
    telegram.outage()
    bot.open_gate("gate")
    telegram.write("!say second", thread=7)
    telegram.write("!say third", thread=8)
    wait_state(bot, "answered")
    time.sleep(0.4)
    telegram.end_outage()
    for text, thread in (("first", 7), ("second", 7), ("third", 8)):
        telegram.answer(text, thread=thread)
    assert telegram.texts(7) == ["first", "second"] and telegram.texts(8) == ["third"]
    assert len(bot.prompts()) == 3


@bot_with(HASTY)
@ahead
def test_dropped_connections_and_pages_of_proxies_delay_only(telegram, bot):
    for method in ("getUpdates", "sendMessageDraft", "sendMessage", "sendRichMessage"):
        telegram.fault(method, drop="before")
        telegram.fault(method, status=502, html=True)
        telegram.fault(method, status=500)
    telegram.fault("getUpdates", drop="after")
    telegram.write("!say plain", thread=7)
    telegram.answer("plain", thread=7)
    telegram.write("!say **rich**", thread=7)
    assert telegram.answer("rich", thread=7).method == "sendRichMessage"
    assert (times_said(telegram, "plain"), times_said(telegram, "rich"), len(bot.prompts())) == (1, 1, 2)


@ahead
def test_a_429_silences_its_chat_alone_and_the_answer_goes_first(telegram, bot):
    limited = telegram.fault("sendMessageDraft", status=429, retry_after=2,
                             when=lambda call: call.params["chat_id"] == ALICE["id"])
    telegram.write("!chunks 20 30 0.01\n!say the end", thread=7)
    telegram.wait_until(lambda: limited.hits, what="the 429")
    closed = telegram.find(DRAFT, ok=False)[0]
    telegram.write("!say other topic", thread=8)
    telegram.write("!say other chat", user=BOB)
    telegram.answer("other chat", user=BOB, timeout=1.9)
    telegram.answer("the end", thread=7)
    telegram.answer("other topic", thread=8)
    later = [call for call in telegram.calls[closed.number + 1:] if call.params.get("chat_id") == ALICE["id"]]
    assert later[0].time - closed.time >= 2
    assert {call.method for call in later[:2]} == {"sendMessage"}


def test_a_flood_limited_chat_silences_nobody_else(telegram, bot):
    telegram.fault("sendMessage", status=429, retry_after=60, when=lambda call: call.params["chat_id"] == ALICE["id"])
    for thread in range(1, 12):
        telegram.write("/status", thread=thread)
    telegram.write("/status", user=BOB, thread=7)
    telegram.answer("Session", user=BOB, thread=7)


@bot_with(HASTY)
@ahead
def test_a_429_is_no_refusal_of_the_format(telegram, bot):
    telegram.fault("sendRichMessage", status=429, retry_after=1)
    telegram.fault("sendRichMessage", status=429)
    plain = telegram.fault("sendMessage", status=429)
    telegram.write("!say **rich**", thread=7)
    telegram.write("!say plain", user=BOB)
    telegram.answer("plain", user=BOB)
    answer = telegram.answer("rich", thread=7)
    first, second, _ = telegram.find("sendRichMessage", ok=None)
    assert answer.method == "sendRichMessage" and second.time - first.time >= 1 and answer.time - second.time >= 0.2
    assert plain.hits == 1 and telegram.texts(user=ALICE) == ["**rich**"] and telegram.texts(user=BOB) == ["plain"]


def test_a_poll_that_is_limited_waits_as_long_as_it_is_told(limited):
    _, telegram = limited
    telegram.answer("hello", thread=7)
    first, second, third = telegram.find("getUpdates", ok=None)[:3]
    assert second.time - first.time >= 1 and third.time - second.time >= 0.2


def test_what_telegram_refuses_as_rich_goes_plain(telegram, bot):
    for status, why in ((400, "Bad Request: RICH_MESSAGE_DEPTH_INVALID"), (400, "Bad Request: RICH_MESSAGE_WHATEVER"),
                        (404, "Not Found: method not found")):
        telegram.fault("sendRichMessage", status=status, description=why)
    for text in ("**refused** and $5", "**again** and $6", "**unknown** and $7", "**known to be unknown** and $8"):
        assert recite(telegram, bot, text) == [text]
    assert len(telegram.find("sendMessage")) == 4 and len(telegram.find("sendRichMessage", ok=None)) == 3


IMPATIENT = {**HASTY, "RETRY_AT_MOST": 0.05, "ANSWER_SECONDS": 0.35, "HOLD_SECONDS": 0.5, "SAY_SECONDS": 0.35}


@bot_with(IMPATIENT)
@ahead
def test_what_telegram_fails_at_goes_in_another_form_or_waits_and_blocks_nobody(telegram, bot):
    for method in ("sendRichMessage", "sendDocument", "sendPhoto"):
        telegram.fault(method, status=500, times=None)
    page = telegram.fault("sendMessage", status=502, html=True, times=None, when=lambda call: call.text == "stuck")
    telegram.write("!say stuck", thread=7)
    telegram.write("!say stuck", thread=9)
    in_workspace(bot, {"b.png": png()}, thread=8)
    telegram.write(f"!say **rich**\n!say {tag('b.png')}", thread=8)
    assert telegram.answer("**rich**", thread=8).method == "sendMessage"
    assert "but it can't be sent.\n500" in telegram.answer("Kiro wanted to send b.png", thread=8).text
    told = telegram.answer("gives it up.\nBad Gateway", thread=7)
    telegram.write("!say next", thread=7)
    telegram.answer("next", thread=7)
    telegram.write("/status", thread=7)
    telegram.answer("Telegram does not take it, try ", thread=7)
    telegram.answer("does not take a part", thread=9)
    telegram.write("/stop", thread=9)
    telegram.answer("given up", thread=9)
    wait_until(lambda: "does not take" not in ask(telegram, "/status", thread=9))
    assert not rings(told)
    telegram.write("!say cut off\n!silence", thread=7)
    bot.wait_prompt("cut off")
    bot.kill()
    bot.start()
    telegram.answer("does not take a part", thread=7, count=2)
    telegram.press(telegram.answer("I was interrupted", thread=7), "Drop")
    hits = page.hits
    time.sleep(0.5)
    assert page.hits - hits <= 3
    page.end()
    assert rings(telegram.answer("stuck", thread=7))
    wait_state(bot, "done", len(bot.database("SELECT * FROM inbox")))
    telegram.write("/stop", thread=9)
    telegram.answer("Nothing is running", thread=9)
    assert telegram.texts(9, containing="stuck") == [] and not bot.database("SELECT * FROM parts")


@bot_with(IMPATIENT)
@ahead
def test_a_file_that_was_asked_for_and_got_stuck_on_the_way_is_told(telegram, bot):
    in_workspace(bot, {"a.txt": b"a"}, thread=7)
    lost = telegram.fault("sendDocument", drop="before", times=None)
    telegram.write("/get a.txt", thread=7)
    telegram.answer("/get PATH sends a file of this topic's folder, but it can't be sent.\nConnectionError", thread=7)
    lost.end()
    settle(bot)


REFUSED_TOPICS = ["Bad Request: TOPIC_CLOSED", "Bad Request: TOPIC_ID_INVALID", "Bad Request: TOPIC_DELETED",
                  "Bad Request: invalid message thread identifier specified",
                  "Bad Request: need administrator rights in the channel chat"]


@bot_with(IMPATIENT)
@ahead
def test_what_is_refused_in_a_topic_goes_to_the_chat_or_waits(telegram, bot):
    for thread, description in enumerate(REFUSED_TOPICS, 1):
        for method in ("sendMessage", "sendRichMessage", "sendDocument"):
            telegram.fault(method, status=400, description=description, times=None,
                           when=lambda call, thread=thread: call.thread == thread)
        in_workspace(bot, {"a.txt": b"a"}, thread=thread)
        telegram.write(f"!say **answer {thread}**\n!say {tag('a.txt')}", thread=thread)
    for thread in range(1, 1 + len(REFUSED_TOPICS)):
        telegram.answer(f"**answer {thread}**", thread=None)
    telegram.wait_until(lambda: len(telegram.texts(None)) == 3 * len(REFUSED_TOPICS), what="notices, answers and files")
    assert all(times_said(telegram, f"here.\n{description}") == 1 for description in REFUSED_TOPICS)
    blocked = telegram.fault("sendMessage", status=403, description="Forbidden: bot was blocked by the user", times=None)
    telegram.write("!say at last", thread=9)
    telegram.wait_until(lambda: blocked.hits, what="the refusal")
    bot.restart()
    telegram.wait_until(lambda: blocked.hits > 3, what="another try")
    hits = blocked.hits
    time.sleep(0.25)
    assert blocked.hits - hits < 5
    blocked.end()
    telegram.answer("at last", thread=9)


def test_the_answer_to_a_deleted_topic_goes_to_the_chat_and_says_so(telegram, bot):
    telegram.write("!wait gate\n!say the answer", thread=7)
    bot.wait_prompt("the answer")
    telegram.delete_topic(7)
    bot.open_gate("gate")
    telegram.answer("the answer", thread=None)
    notice, answer = telegram.find(None)
    assert "topic is gone" in notice.text and notice.thread is None
    telegram.write("!say elsewhere", thread=8)
    telegram.answer("elsewhere", thread=8)


def test_updates_that_cannot_be_read_stop_nothing(telegram, bot):
    chat = telegram.open_topic(7)
    good = {"message_id": 9, "from": ALICE, "chat": chat, "date": 1, "text": "!say bad"}
    message = {"message_thread_id": 7, "is_topic_message": True, **good}
    bad_messages = [{"from": None}, {"from": []}, {"from": "x"}, {"chat": None}, {"chat": []}, {"entities": 17},
                    {"message_id": {}}, {"message_id": 2**70}, {"text": {}}, {"photo": [{}]}, {"text": "!say \ud83d"}]
    with telegram.batch_of_updates():
        for change in bad_messages:
            telegram.deliver(message={**message, **change})
            telegram.deliver(edited_message={**message, **change})
            telegram.deliver(callback_query={"id": "1", "from": ALICE, "message": {**message, **change}, "data": "x",
                                             "chat_instance": "1"})
        for content in ({}, {"message": None}, {"message": []}, {"callback_query": {}}, {"new_kind": {}},
                        {"message": {key: value for key, value in message.items() if key not in ("from", "date")}}):
            telegram.deliver(**content)
        last = telegram.write("!say good", thread=7)
    telegram.answer("good", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(last))


@pytest.mark.parametrize("how", ["message", "edited_message", "callback_query"])
def test_what_cannot_be_read_is_told_where_it_was_written(telegram, bot, how):
    message = telegram.write("!say first", thread=7)
    telegram.answer("first", thread=7)
    if how == "callback_query":
        telegram.deliver(callback_query={"id": "1", "from": ALICE, "message": {**message, "date": []}, "data": {}})
    else:
        telegram.deliver(**{how: {**message, "message_id": 2**70, "photo": [{}]}})
    telegram.answer("couldn't read", thread=7)
    assert len(bot.prompts()) == 1


NEW_IN_QUOTES = [
    ({"reply_to_message": {"message_id": 3, "date": 1, "chat": {"id": 1, "type": "private"}, "rich_message": {"blocks": [
        {"type": "pre", "text": '{"type": "code", "n": 1}'}]}}}, '> ```\n> {"type": "code", "n": 1}\n> ```\n\n'),
    ({"reply_to_message": {}}, ""),
    ({"reply_to_message": {"message_id": 3, "text": "x", "entities": 5}}, "> (This could not be read.)\n\n"),
    ({"external_reply": {"origin": []}}, "> (This could not be read.)\n\n"),
    ({"forward_origin": {"type": "new"}}, "[Forwarded from somebody]\n"),
    ({"paid_media": {"star_count": 1, "paid_media": [{"type": "new"}]}}, ""),
    ({"poll": {"question": "?", "options": [{"text": "yes"}]}}, ""),
]


def test_what_is_new_in_quotes_and_forwards_loses_no_words(telegram, bot):
    bot.habits(new={"gate": "gate"})
    for n, (novelty, _) in enumerate(NEW_IN_QUOTES):
        telegram.write(f"words {n}", thread=7, **novelty)
    bot.wait_wire("in", "session/new")
    wait_state(bot, "waiting", len(NEW_IN_QUOTES))
    bot.kill()
    bot.open_gate("gate")
    bot.start()
    said = "\n\n" + bot.wait_prompt("words 6")["frame"]["params"]["prompt"][0]["text"] + "\n"
    for n, (_, quote) in enumerate(NEW_IN_QUOTES):
        assert f"\n\n{quote}words {n}\n" in said


def test_a_press_is_answered_whatever_its_message_is(telegram, bot):
    telegram.write("!ask", thread=7)
    question = telegram.answer("Kiro wants", thread=7)
    data = telegram.buttons(question)[0]["callback_data"]
    odd = {"blocks": [{"type": 5, "text": '{"type": "code", "n": 1}'}]}
    with telegram.changed:
        telegram.messages[ALICE["id"], question.message["message_id"]]["rich_message"] = odd
    for press in (telegram.press(question, data="new:1"), telegram.press(question, data=""),
                  telegram.press(question, data=data, inline=True)):
        telegram.wait_for("answerCallbackQuery", when=lambda call: call.params["callback_query_id"] == press["id"]
                          and call.params["text"] == "This is over.")
    telegram.press(question, "Yes")
    telegram.answer("allow_once", thread=7)


@bot_with(QUICK)
def test_a_stop_with_a_field_that_is_not_known_yet_stops(telegram, bot):
    telegram.write("!say begun\n!silence", thread=7)
    draft = telegram.wait_for(DRAFT, containing="begun")
    telegram.deliver(stopped_message_generation={"chat": telegram.chats[ALICE["id"]], "message_thread_id": 7,
                                                 "draft_id": draft.params["draft_id"], "reason": "new"})
    telegram.answer("Stopped", thread=7)


@ahead
def test_what_is_delivered_again_is_not_answered_again(telegram, bot):
    message = telegram.write("!say once", thread=7)
    telegram.answer("once", thread=7)
    wait_state(bot, "done")
    telegram.redeliver(message)
    assert ask(telegram, "soon") == "echo: soon"
    telegram.redeliver(message)
    bot.restart()
    telegram.redeliver(message)
    assert ask(telegram, "later") == "echo: later"
    assert len(bot.prompts()) == 3 and times_said(telegram, "once") == 1


def test_a_hundred_messages_at_once_are_all_answered_in_their_order(telegram, bot):
    with telegram.batch_of_updates():
        for number in range(120):
            telegram.write(f"!say <{number}>", thread=number % 5 + 1)
    for thread in range(1, 6):
        own = [f"<{number}>" for number in range(thread - 1, 120, 5)]
        telegram.wait_until(lambda: re.findall("<[0-9]+>", "".join(telegram.texts(thread))) == own, what=f"topic {thread}")
    asked = re.findall("<[0-9]+>", "".join(bot.prompts()))
    assert sorted(asked) == sorted(f"<{number}>" for number in range(120))


@bot_with(HASTY)
@ahead
def test_a_message_whose_confirmation_is_lost_is_sent_once_more(telegram, bot):
    telegram.fault("sendMessage", drop="after")
    telegram.write("!say cut off", thread=7)
    telegram.answer("cut off", thread=7, count=2)
    telegram.fault("sendMessage", hang=3)
    telegram.write("!say too late", thread=7)
    telegram.answer("too late", thread=7, count=2)
    telegram.write("!say next", thread=7)
    telegram.answer("next", thread=7)
    assert telegram.texts() == ["cut off"] * 2 + ["too late"] * 2 + ["next"]


@bot_with(dict(EMPTY_SECONDS=0.3))
@ahead
def test_a_server_that_answers_at_once_is_not_asked_without_a_pause(telegram, bot):
    telegram.impatient = True
    telegram.write("hello", thread=7)
    telegram.answer("echo: hello", thread=7)
    before = telegram.mark()
    telegram.wait_for("getUpdates", after=before, count=3, ok=None)
    polls = [call.time for call in telegram.find("getUpdates", after=before, ok=None)]
    assert polls[-1] - polls[0] > 0.4  # of 0.6, since the first may arrive late


@bot_with(HASTY)
@ahead
def test_a_conflict_is_waited_out_and_ends_a_bot_that_cannot_win(telegram, bot):
    telegram.fault("getUpdates", status=409, times=3)
    telegram.write("!say hello", thread=7)
    telegram.answer("hello", thread=7)
    telegram.fault("getUpdates", status=409, times=None)
    telegram.write("!say last", thread=7)
    assert bot.ended() == 1
    assert "only one bot instance" in bot.log().splitlines()[-2]


def test_a_webhook_is_removed_and_one_that_comes_back_ends_the_bot(telegram, make_bot):
    webhook = "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook first"
    telegram.fault("getUpdates", status=409, description=webhook, times=2)
    bot = make_bot().start()
    telegram.write("!say hello", thread=7)
    telegram.answer("hello", thread=7)
    assert len(telegram.find("deleteWebhook")) == 2
    telegram.fault("getUpdates", status=409, description=webhook, times=None)
    telegram.write("!say more", thread=7)
    assert bot.ended() == 1


def test_a_token_that_is_revoked_ends_the_bot(telegram, bot):
    telegram.fault("getUpdates", status=401, times=None)
    telegram.write("!say hello", thread=7)
    assert bot.ended() == 1
    assert "BOT_TOKEN" in bot.log() and "BotFather" in bot.log()


# ---------------------------------------------------------------------------------------------------------
# The tests: the bot's faults
# ---------------------------------------------------------------------------------------------------------


@ahead
def test_what_no_turn_had_begun_is_handled_at_the_next_start(telegram, bot):
    bot.habits(new={"gate": "never"})
    messages = [telegram.write(f"!say {text}", thread=thread) for text, thread in (("one", 7), ("two", 7), ("three", None))]
    telegram.wait_until(lambda: all(map(telegram.is_acknowledged, messages)))
    for _ in range(3):
        bot.kill()
        bot.start()
    assert telegram.texts() == [] and bot.prompts() == []
    bot.habits()
    bot.kill()
    bot.start()
    for text, thread in (("one", 7), ("two", 7), ("three", None)):
        telegram.answer(text, thread=thread)
    assert "".join(bot.prompts()).count("!say") == 3


def test_of_an_answer_only_the_missing_parts_are_sent(telegram, bot):
    bot.control_file("long", "".join(f"line {number}\n" for number in range(1500)))
    unreachable = telegram.fault("sendMessage", status=500, times=None, when=lambda call: "line 700\n" in call.text)
    telegram.write("!recite long 5000", thread=7)
    for _ in range(3):
        telegram.wait_until(lambda: unreachable.hits, what="the part that fails")
        bot.kill()
        unreachable.hits = 0
        bot.start()
    unreachable.end()
    telegram.answer("line 1499", thread=7)
    assert "\n".join(telegram.texts()).split("\n") == [f"line {number}" for number in range(1500)]
    assert len(bot.prompts()) == 1
    wait_state(bot, "done")


@ahead
def test_what_was_cut_off_is_offered_and_only_once_run_again(telegram, bot):
    telegram.write("!wait never\n!say ask me again", thread=7)
    telegram.write("!wait never\n!say drop me", thread=8)
    telegram.write("!wait never\n!say no topic", thread=9)
    for text in ("ask me again", "drop me", "no topic"):
        bot.wait_prompt(text)
    bot.kill()
    telegram.delete_topic(9)
    bot.start()
    again, drop = telegram.answer("I was interrupted", thread=7), telegram.answer("drop me", thread=8)
    lonely = telegram.answer("no topic", thread=None)
    wait_state(bot, "offered", 3)
    for _ in range(2):
        bot.kill()
        bot.restart()
    assert times_said(telegram, "I was interrupted") == 3 and len(bot.prompts()) == 3
    bot.open_gate("never")
    data = telegram.find_button(again, "Ask")["callback_data"]
    with telegram.batch_of_updates():
        for message, button in ((again, "Ask"), (again, "Ask"), (drop, "Drop"), (lonely, "Ask")):
            telegram.press(message, button)
    telegram.wait_until(lambda: telegram.texts(7)[1:] == ["ask me again"] and telegram.texts(None)[-1] == "no topic",
                        what="the answers")
    wait_state(bot, "done", 3)
    bot.kill()
    bot.start()
    telegram.press(again, data=data)
    telegram.press(drop, data=data[:-1] + "2")
    telegram.wait_for("answerCallbackQuery", count=6)
    assert len(bot.prompts()) == 5 and len(telegram.texts(7)) == 2 and len(telegram.texts(8)) == 1
    assert not any(telegram.buttons(message) for message in (again, drop, lonely))


@ahead
def test_a_button_may_be_pressed_as_soon_as_it_is_there(telegram, bot):
    bot.habits(prompt={"exit": 1, "times": 2})
    telegram.fault("sendMessage", hang=0.3)  # the bot does not know yet that it is there
    telegram.write("!say at last", thread=7)
    telegram.press(telegram.answer("exited", thread=7), "Ask again")
    telegram.answer("at last", thread=7)


@ahead
def test_a_card_that_could_not_be_sent_comes_once_it_can(telegram, bot):
    telegram.write("!silence\n!say cut off", thread=7)
    bot.wait_prompt("cut off")
    unreachable = telegram.fault("sendMessage", status=500, times=None)
    for _ in range(3):
        bot.kill()
        bot.start()
    unreachable.end()
    telegram.answer("I was interrupted", thread=7)
    wait_state(bot, "offered")
    assert times_said(telegram, "I was interrupted") == 1


@ahead
def test_an_answer_behind_a_note_that_could_not_be_sent_is_formatted_after_a_restart(telegram, bot):
    in_workspace(bot, {"a.txt": b"a"}, thread=7)
    unreachable = telegram.fault("sendMessage", status=500, times=None)
    telegram.write(f"!context 85\n!say **bold** {tag('a.txt')}", thread=7)
    telegram.wait_for("sendMessage", containing="context is used", ok=False, thread=7)
    bot.kill()
    unreachable.end()
    bot.start()
    telegram.answer("context is used", thread=7)
    telegram.wait_for("sendDocument", thread=7)
    assert telegram.answer("bold", thread=7).method == "sendRichMessage" and not times_said(telegram, "send_file")


@ahead
def test_a_turn_that_cannot_be_read_any_more_costs_nobody_else(telegram, bot):
    for thread in (7, 8):
        telegram.write("!silence", thread=thread)
    bot.wait_wire("in", "session/prompt", count=2)
    bot.kill()
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as other:
        other.execute("UPDATE inbox SET body = '{}' WHERE thread_id = 7")
    bot.start()
    telegram.answer("I was interrupted", thread=8)
    goes_on(telegram, 7)
    bot.check = lambda: None  # the log tells of it with a traceback


@bot_with(QUICK)
def test_an_orderly_stop_keeps_what_was_said_and_what_waits(telegram, bot):
    telegram.write("!say the first half\n!silence", thread=7)
    telegram.wait_for(DRAFT, containing="the first half")
    waits = telegram.write("!say waiting", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(waits))
    assert bot.stop() < 3
    bot.start()
    telegram.answer("waiting", thread=7)
    assert telegram.texts(7)[0] == "the first half"
    assert "I was interrupted" in telegram.texts(7)[1]
    assert len(telegram.texts(7)) == 3 and len(bot.prompts()) == 2


@ahead
def test_an_orderly_stop_waits_for_the_confirmation_of_what_was_sent(telegram, bot):
    telegram.write("!say sent", thread=7)
    telegram.fault("sendMessage", hang=0.5)
    telegram.answer("sent", thread=7)
    bot.restart()
    telegram.write("!say next", thread=7)
    telegram.answer("next", thread=7)
    assert telegram.texts(7) == ["sent", "next"]


STUBBORN = dict(ignore_stdin_end=True, ignore_term=True, cancel={"hang": True})


@pytest.mark.parametrize("by, habits", [(signal.SIGTERM, STUBBORN), (signal.SIGINT, {}), (signal.SIGHUP, {})])
def test_a_signal_ends_everything_within_two_seconds(telegram, bot, by, habits):
    bot.habits(**habits)
    for thread in (6, 7, 8, 9):
        telegram.write("!say x\n!spawn setsid pipes\n!silence", thread=thread)
    bot.wait_wire("in", "session/prompt", count=3)
    assert bot.stop(by=by) < 3  # two, and what a busy machine adds
    assert bot.process.returncode == 0
    bot.wait_agents(0, timeout=1)  # a process that was killed is gone some time later


# A slow machine: the folder of topic 8 is made, and a process of topic 9 started, only some time after the gate is open.
SLOW = """
import os, subprocess, time
def wait():
    while not os.path.exists(os.environ["KIRO_STAND_IN"] + "/go"):
        time.sleep(0.005)
    time.sleep(0.2)
def makedirs(path, *args, make=os.makedirs, **kwargs):
    make(path, *args, **kwargs)
    if path.endswith("/8"):
        wait()
def popen(self, *args, start=subprocess.Popen.__init__, **kwargs):
    start(self, *args, **kwargs)
    if str(kwargs.get("cwd")).endswith("/9"):
        wait()
os.makedirs, subprocess.Popen.__init__ = makedirs, popen
import bot
bot.start([])
"""


def slow_down(bot):
    bot.habits(ignore_stdin_end=True, cancel={"hang": True})
    bot.command = lambda *arguments: [sys.executable, "-c", SLOW]
    bot.restart()


@ahead
def test_a_process_that_is_starting_when_the_bot_is_stopped_ends_with_it(telegram, bot):
    slow_down(bot)
    telegram.write("hello", thread=9)
    bot.wait_wire("start")
    bot.process.terminate()
    bot.open_gate("go")
    assert bot.ended() == 0 and not bot.agents()


@ahead
def test_no_process_is_started_once_the_bot_is_being_stopped(telegram, bot):
    slow_down(bot)
    telegram.write("!silence", thread=7)
    bot.wait_prompt("!silence")
    telegram.write("hello", thread=8)
    wait_until(bot.workspace(8).exists)
    bot.process.terminate()
    bot.wait_wire("in", "session/cancel")
    bot.open_gate("go")
    assert bot.ended() == 0 and not bot.agents()
    assert len(bot.wire("start")) == 1


def test_a_bot_under_nohup_outlives_its_terminal(telegram, make_bot):
    bot = make_bot()
    bot.command = lambda usual=bot.command: ["nohup", *usual()]
    bot.start()
    bot.process.send_signal(signal.SIGHUP)
    assert ask(telegram, "still there?") == "echo: still there?"


def test_kiro_ends_when_the_bot_dies(telegram, bot):
    telegram.write("hello", thread=7)
    telegram.answer("hello", thread=7)
    telegram.write("!silence", thread=8)
    bot.wait_prompt("!silence")
    bot.wait_agents(2)
    bot.kill()
    bot.wait_agents(0, timeout=3)


def test_a_second_bot_in_the_folder_says_so_and_exits(telegram, bot):
    second = bot.run()
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1 and "Another bot is running" in second.stderr
    telegram.write("hello", thread=7)
    telegram.answer("echo: hello", thread=7)
    assert len(telegram.find("getMe")) == 1


def test_a_folder_that_cannot_be_locked_is_no_obstacle(telegram, make_bot):
    bot = make_bot().change("bot.fcntl.flock = lambda *_: bot.os.open('/no', 0)").start()
    telegram.write("hello", thread=7)
    telegram.answer("echo: hello", thread=7)
    assert "can't be locked" in bot.log()


@contextlib.contextmanager
def full_disk(bot):
    """The bot can't write a byte more; its agents can."""
    limits = resource.prlimit(bot.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(bot.process.pid, resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(bot.process.pid, resource.RLIMIT_FSIZE, limits)


NO_THREAD = """
def start(self, begin=threading.Thread.start, spent=[]):
    if self.name == "errand" and self._args[0] != "menu" and not spent:
        spent.append(self)
        raise RuntimeError("can't start new thread")
    begin(self)
threading.Thread.start = start
"""


def test_a_topic_outlives_a_moment_without_threads(telegram, make_bot):
    bot = make_bot().change(f"import threading; exec({NO_THREAD!r})").start()
    telegram.write("/status", thread=7)
    bot.wait_log("can't start new thread")
    assert "Nothing is running" in ask(telegram, "/status")
    bot.log_path.write_text("")  # of a traceback


@bot_with(QUICK)
@ahead
def test_nothing_that_kiro_says_beside_its_answer_is_a_flood(telegram, bot):
    much = "session " * 40_000
    call = dict(sessionUpdate="tool_call", toolCallId="t", title="cat")
    failure = {"method": "_kiro.dev/mcp/server_init_failure", "params": {"serverName": "s", "error": much}}
    commands = update(dict(sessionUpdate="available_commands_update", availableCommands=[{"name": much}]))
    for name, line in (("output", update(call, status="completed", content=[{"content": {"text": much}}])),
                       ("title", update(call, title=much)), ("server", "!raw " + json.dumps(failure) + "\n"), ("commands", commands)):
        bot.control_file(name, line[5:])
    telegram.write("!raw_file output", thread=1)
    telegram.write("!raw_file title\n!silence", thread=2)
    telegram.wait_for(DRAFT, containing="session", thread=2)
    assert len(ask(telegram, "/status", thread=2)) < 1000
    telegram.write("!raw_file server\n!say done", thread=3)
    telegram.write("!raw_file commands\n!say done", thread=4)
    telegram.answer("done", thread=4)
    telegram.write("/help", thread=4)
    for thread in (1, 3, 4):
        telegram.answer("more characters are not shown", thread=thread)
    bot.habits(prompt={"error": -32603, "message": "Internal error", "data": much, "times": 1})
    telegram.write("hello", thread=1)
    telegram.answer("more characters are not shown", thread=1, count=2)
    goes_on(telegram, 1, 3, 4)
    assert max(len(telegram.texts(thread)) for thread in (1, 2, 3, 4)) < 20


POISON = """
bot.FROZEN_SECONDS, bot.HEARTBEAT_SECONDS, bot.FRAME_SECONDS = 0.5, 0.1, 0.02
bot.has_markdown = lambda text: 'poison' in text and open('frozen', 'w') and bot.re.match('(a|a)*b', 'a' * 99)
"""


@ahead
def test_a_text_that_freezes_the_program_costs_one_topic_one_plain_answer(telegram, bot):
    bot.change(POISON).restart()
    telegram.write("!say **poison**", thread=7)
    wait_until((bot.folder / "frozen").exists)
    bot.process.terminate()
    assert bot.ended(10) != 0 and "in match" in bot.log()  # processor time, which others may want too
    bot.start()
    telegram.answer("**poison**", thread=7)
    telegram.write("!say half **poison**\n!silence", thread=7)
    telegram.wait_for(DRAFT, containing="half", thread=7)
    bot.stop()
    bot.start(wait=False)
    bot.ended(10)  # it froze over the card
    bot.start()
    telegram.answer("half **poison**", thread=7)
    telegram.answer("I was interrupted while working on", thread=7)
    telegram.write("!say next", thread=8)
    telegram.answer("next", thread=8)


@bot_with(dict(STOP_REASONS=None))
def test_what_kiro_said_survives_what_nobody_foresaw(telegram, bot):
    telegram.write("!say precious", thread=7)
    failed = telegram.answer("⚠️ Something went wrong here", thread=7)
    assert telegram.texts(7)[0] == "precious" and [b["text"] for b in telegram.buttons(failed)] == ["Ask again", "Drop"]
    wait_state(bot, "offered")
    assert not bot.database("SELECT * FROM parts")
    telegram.press(failed, "Ask again")
    telegram.answer("precious", thread=7, count=2)
    wait_state(bot, "offered")
    bot.log_path.write_text("")  # of a traceback


def test_numbers_and_kinds_that_nobody_expects_end_nothing(telegram, bot):
    huge = "1" + "0" * 400
    for method, params in (("_kiro.dev/metadata", f'{{"contextUsagePercentage":{huge},"meteringUsage":[{{"value":{huge}}}]}}'),
                           ("session/update", f'{{"update":{{"sessionUpdate":"usage_update","used":{huge},"size":1}}}}'),
                           ("_kiro.dev/compaction/status", '{"status":{"type":{"a":1},"error":[1]}}'),
                           ("_kiro.dev/compaction/status", '{"status":["started"]}'),
                           ("_kiro.dev/session/update", '{"update":{"sessionUpdate":["retry_warning"]}}'),
                           ("_kiro.dev/mcp/oauth_request", '{"serverName":["a"],"oauthUrl":{"b":1}}')):
        telegram.write(f'!raw {{"jsonrpc":"2.0","method":"{method}","params":{params}}}\n!say ok', thread=7)
    telegram.answer("ok", thread=7)
    settle(bot)
    assert "Nothing is running" in ask(telegram, "/status")


@bot_with(dict(BUSY_SECONDS=0.2, JOURNAL_RETRY_SECONDS=0.3))
@ahead
def test_a_database_that_somebody_holds_while_kiro_starts_costs_nothing(telegram, bot):
    bot.habits(new={"gate": "gate"})
    telegram.write("hello", thread=7)
    bot.wait_wire("in", "session/new")
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        bot.open_gate("gate")
        telegram.wait_for(DRAFT, containing="database is locked", thread=7)
    bot.habits()
    telegram.answer("echo: hello", thread=7)
    telegram.write("/new", thread=7)
    telegram.answer("A new session", thread=7)
    assert len(bot.prompts()) == 1


@bot_with(dict(JOURNAL_RETRY_SECONDS=2, FRAME_SECONDS=0.05))
@ahead
def test_a_command_whose_note_the_database_refuses_is_tried_again_with_pauses(telegram, bot):
    ask(telegram, "hello")
    settle(bot)
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as other:
        other.execute("CREATE TRIGGER full BEFORE UPDATE ON sessions BEGIN SELECT RAISE(FAIL, 'disk full'); END")
        before = len(bot.wire("in", "session/new"))
        began = time.monotonic()
        telegram.write("/new", thread=7)
        bot.wait_wire("in", "session/new", count=before + 2)
        assert time.monotonic() - began > 2
        other.execute("DROP TRIGGER full")
    telegram.answer("A new session", thread=7)
    goes_on(telegram, 7)


@bot_with(dict(JOURNAL_RETRY_SECONDS=0.3))
@ahead
def test_what_was_taken_back_or_stopped_while_the_disk_was_full_does_not_come_back(telegram, bot):
    telegram.write("!wait go\n!say over", thread=7)
    bot.wait_prompt("over")
    taken_back = telegram.write("taken back", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(taken_back))
    telegram.write("/status", thread=7)
    status = telegram.answer("Waiting: taken back", thread=7)
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as other:
        other.execute("CREATE TRIGGER full BEFORE UPDATE ON inbox WHEN new.state = 'done' BEGIN SELECT RAISE(FAIL, 'disk full'); END")
        telegram.press(status, "Remove")
        telegram.answer("Removed.", thread=7)
        telegram.write("/stop", thread=7)
        telegram.answer("⏹ Stopped.", thread=7)
        other.execute("DROP TRIGGER full")
    settle(bot)
    bot.restart()
    goes_on(telegram, 7)
    assert not any("taken back" in prompt for prompt in bot.prompts())


@bot_with(dict(BUSY_SECONDS=1, JOURNAL_RETRY_SECONDS=0.3))
def test_a_stop_counts_while_somebody_holds_the_database(telegram, bot):
    bot.habits(new={"gate": "gate"})
    telegram.write("never", thread=7)
    bot.wait_wire("in", "session/new")
    with contextlib.closing(sqlite3.connect(bot.folder / "tg-acp.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        bot.open_gate("gate")
        bot.wait_wire("out", when=lambda entry: "sessionId" in entry["frame"].get("result", {}))
        telegram.stop(telegram.drafts(7)[-1])
        telegram.answer("⏹ Stopped before Kiro began", thread=7)
    bot.habits()
    goes_on(telegram, 7)
    assert not any("never" in prompt for prompt in bot.prompts())


@bot_with(dict(JOIN_SECONDS=0.3))
@ahead
def test_a_note_that_is_longer_than_a_message_arrives_whole(telegram, bot):
    error = " ".join(f"word{n}" for n in range(1500))
    telegram.write('!raw {"jsonrpc":"2.0","method":"_kiro.dev/agent/config_error","params":{"error":"' + error + '"}}\n!say the end',
                   thread=7)
    telegram.answer("the end", thread=7)
    assert error in " ".join(telegram.texts(7)).replace("  ", " ")
    wait_state(bot, "done")
    assert not bot.database("SELECT * FROM parts") and "can't be" not in bot.log()


@bot_with(HASTY)
@ahead
def test_on_a_full_disk_messages_stay_with_telegram_and_answers_arrive(telegram, bot):
    telegram.write("!wait gate\n!say finished", thread=7)
    bot.wait_prompt("finished")
    agents = bot.agents()
    with full_disk(bot):
        late = telegram.write("!say not stored", thread=8)
        telegram.answer("can't store", thread=8)
        bot.open_gate("gate")
        telegram.answer("finished", thread=7)
        wait_until(lambda: bot.agents() - agents, what="the next process, which begins after the turn's end")
        assert not telegram.is_acknowledged(late) and times_said(telegram, "can't store") == 1
    telegram.answer("not stored", thread=8)
    wait_state(bot, "done", 2)
    bot.kill()
    bot.start()
    telegram.write("!say later", thread=7)
    telegram.answer("later", thread=7)
    assert times_said(telegram, "finished") == 1 and not telegram.find(containing="interrupted") and len(bot.prompts()) == 3


@bot_with(HASTY)
def test_what_failed_on_a_full_disk_can_be_asked_again(telegram, bot):
    telegram.write("!wait gate\n!error -32603 no space left", thread=7)
    bot.wait_prompt("no space left")
    with full_disk(bot):
        bot.open_gate("gate")
        failed = telegram.answer("no space left", thread=7)
    telegram.press(failed, "Ask again")
    telegram.answer("no space left", thread=7, count=2)


@bot_with(HASTY)
@ahead
def test_a_bot_that_starts_on_a_full_disk_waits_in_peace(telegram, bot):
    telegram.write("!silence\n!say cut off", thread=7)
    bot.wait_prompt("cut off")
    bot.kill()
    telegram.fault("getMe", hang=0.3)
    bot.start(wait=False)
    telegram.wait_for("getMe", ok=None, count=2)
    with full_disk(bot):
        before = bot.cpu()
        time.sleep(0.4)
        assert bot.cpu() - before < 0.15
    telegram.answer("I was interrupted", thread=7)


def test_a_folder_that_cannot_be_written_is_named(make_bot):
    bot = make_bot()
    result = bot.run(WORKSPACE_BASE_PATH="/proc/no-such")
    said, = (line for line in result.stderr.splitlines() if " INFO " not in line)
    assert result.returncode == 2 and "WORKSPACE_BASE_PATH" in said
    environment = {**bot.environment(), **bot.settings, "WORKSPACE_BASE_PATH": str(bot.folder / "workspaces")}
    result = subprocess.run(bot.command(), cwd=f"/proc/{os.getpid()}", env=environment, capture_output=True,
                            text=True, timeout=20)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1) and "tg-acp.db can't be used" in result.stderr


@pytest.mark.parametrize("replaced", [False, True])
@ahead
def test_a_database_that_is_deleted_or_replaced_is_opened_anew(telegram, bot, replaced):
    telegram.write("!wait gate\n!say still", thread=7)
    bot.wait_prompt("still")
    (bot.folder / "copy").write_bytes((bot.folder / "tg-acp.db").read_bytes())
    (bot.folder / "tg-acp.db").unlink()
    if replaced:
        (bot.folder / "copy").rename(bot.folder / "tg-acp.db")
    bot.open_gate("gate")
    telegram.answer("still", thread=7)
    assert ask(telegram, "!say going on", thread=8) == "going on"
    settle(bot)
    assert bot.log().count("replaced or deleted") == 1 and "ERROR" not in bot.log()
    assert replaced or (bot.folder / "tg-acp.db").stat().st_mode & 0o777 == 0o600
    assert {row["thread_id"] for row in bot.database()} >= ({7, 8} if replaced else {8})


@pytest.mark.parametrize("content", [b"PK\3\4 this is an archive" * 500, b"short", b"SQLite format 3\0" + b"\0\1" * 4000],
                         ids=["archive", "short", "only a head"])
def test_a_file_that_is_no_database_is_left_as_it_is(make_bot, content):
    bot = make_bot()
    (bot.folder / "tg-acp.db").write_bytes(content)
    result = bot.run()
    assert result.returncode == 1 and "tg-acp.db can't be used" in result.stderr.splitlines()[-1]
    assert (bot.folder / "tg-acp.db").read_bytes() == content
    assert [path.name for path in bot.folder.glob("tg-acp.db*")] == ["tg-acp.db"]


@bot_with(WARM_SECONDS=3)
@ahead
def test_fivefold_kill_loses_nothing_and_runs_nothing_twice(telegram, bot):
    bot.stop()
    figures = Soak(bot, telegram, random.Random(), longest=0.5).run(5)
    assert (figures["lost"], figures["run twice"], figures["answered and offered"]) == (0, 0, 0), figures
    assert figures["offered without a card"] == 0, figures
    assert figures["parts sent twice"] == figures["of these with their confirmation cut off"], figures


# ---------------------------------------------------------------------------------------------------------
# The tests: security
# ---------------------------------------------------------------------------------------------------------


def test_a_stranger_is_told_their_id_once(telegram, bot):
    listed = model_list(telegram)
    with telegram.batch_of_updates():
        first = telegram.write("let me in", user=MALLORY, thread=7)
        telegram.write("please", user=MALLORY)
        telegram.edit(first, "now!")
        telegram.press(listed, "claude-haiku-4.5", user=MALLORY)
        telegram.write("hello group", thread=3, chat=GROUP)
    assert ask(telegram, "mine") == "echo: mine"
    [reply] = telegram.find(after=first, when=lambda call: call.params["chat_id"] != ALICE["id"])
    assert "6666" in reply.text and reply.params["chat_id"] == MALLORY["id"]
    assert row_of(bot)["model"] == "auto" and len(bot.database()) == 1


@pytest.mark.parametrize("in_environment", [False, True])
def test_who_may_use_the_bot_can_change_while_it_runs(telegram, make_bot, in_environment):
    bot = make_bot(ALLOWED_TELEGRAM_IDS=str(ALICE["id"]))
    if in_environment:
        bot.environment = lambda usual=bot.environment: {**usual(), "ALLOWED_TELEGRAM_IDS": str(ALICE["id"])}
    bot.start(ALLOWED_TELEGRAM_IDS="7" if in_environment else str(ALICE["id"]))
    telegram.answer(str(BOB["id"]), after=telegram.write("who am I?", user=BOB))
    bot.set(ALLOWED_TELEGRAM_IDS=f"{ALICE['id']} {BOB['id']}")
    if in_environment:
        ask(telegram, "am I still in?")
        telegram.write("still out?", user=BOB)
        ask(telegram, "and now?")
        assert "Allowed from now on" not in bot.log() and not telegram.find(containing="echo", user=BOB)
        return
    assert ask(telegram, "am I in?", user=BOB) == "echo: am I in?"
    bot.set(ALLOWED_TELEGRAM_IDS='"1')
    assert ask(telegram, "still?", user=BOB) == "echo: still?"
    assert ask(telegram, "really?", user=BOB) == "echo: really?"
    bot.set(ALLOWED_TELEGRAM_IDS="1;2")
    assert ask(telegram, "even now?", user=BOB) == "echo: even now?"
    bot.set(ALLOWED_TELEGRAM_IDS=str(BOB["id"]))
    telegram.answer("This bot is private", user=ALICE, after=telegram.write("and I?"))
    assert bot.log().count("stays as it was") == 2 and bot.log().count("Allowed from now on") == 2


@bot_with(ALLOWED_TELEGRAM_IDS="")
def test_nobody_is_allowed_by_an_empty_list(telegram, bot):
    for user in (ALICE, BOB):
        assert str(user["id"]) in ask(telegram, "hello", None, user=user)
    assert not bot.wire()


def test_nobody_gets_in_but_who_may_and_where(telegram, bot):
    secret = telegram.write("!tool execute Running: make\n!ask\n!say done", thread=7)
    question = telegram.answer("Kiro wants to", thread=7)
    waiting = telegram.write("as I wrote it", thread=7)
    draft = telegram.drafts(7)[0]
    before = telegram.mark()
    mallorys = telegram.write("let me in", user=MALLORY)
    telegram.write("/status", user=MALLORY, thread=7)
    telegram.edit(mallorys, "please")
    for forged in ({"from": MALLORY}, {"chat": {**GROUP, "id": ALICE["id"]}}):
        telegram.edit({**waiting, **forged}, "as somebody else wrote it")
    telegram.send_file("document", b"virus", name="virus", user=MALLORY)
    telegram.write("!say to the group", chat=GROUP)
    telegram.write("/status", chat=GROUP, thread=3)
    telegram.press(question, user=MALLORY)
    telegram.press(question, user=BOB)
    telegram.press(question, user=MALLORY, inline=True)
    telegram.deliver(callback_query={"id": "2", "from": ALICE, "chat_instance": "1",
                                     "data": telegram.buttons(question)[0]["callback_data"],
                                     "message": {**telegram.current(question), "chat": GROUP}})
    for chat in (GROUP, {"id": MALLORY["id"], "type": "private"}, {**GROUP, "id": ALICE["id"]}):
        telegram.deliver(stopped_message_generation={**secret, "chat": chat, "draft_id": draft.params["draft_id"]})
    telegram.write("!say through", user=BOB)
    telegram.answer("through", user=BOB)
    told = [call for call in telegram.find(None, after=before) if call.params["chat_id"] != BOB["id"]]
    assert [call.params["chat_id"] for call in told] == [MALLORY["id"]] and str(MALLORY["id"]) in told[0].text
    assert not telegram.find(("getFile", "download", "answerCallbackQuery", "editMessageText"), ok=None, after=before)
    assert telegram.buttons(question) and not list(bot.folder.glob(f"workspaces/{MALLORY['id']}"))
    telegram.press(question, "Yes")
    telegram.answer("allow_once", thread=7)
    telegram.answer("echo: as I wrote it", thread=7)


@bot_with(MAX_PROCESSES=1)
def test_who_is_no_longer_allowed_is_not_served_but_what_they_wrote_is_kept(telegram, bot):
    telegram.write("!wait go\n!say begun", thread=8, user=BOB)
    bot.wait_prompt("begun")
    waiting = telegram.write("as I wrote it", thread=9, user=BOB)
    telegram.wait_until(lambda: telegram.is_acknowledged(waiting))
    bot.kill()
    bot.start(ALLOWED_TELEGRAM_IDS=ALICE["id"])
    telegram.edit(waiting, "as I thought later")
    assert ask(telegram, "mine") == "echo: mine"
    assert not telegram.find(user=BOB) and len(bot.prompts()) == 2
    bot.restart(ALLOWED_TELEGRAM_IDS=f"{ALICE['id']},{BOB['id']}")
    telegram.answer("I was interrupted", thread=8, user=BOB)
    telegram.answer("echo: as I wrote it", thread=9, user=BOB)


FORGED = [
    "", "x", "🙂" * 16,
    "again", "again:", "again:0", "again:-1", "again:1e3", "again:1\n", "again:1:1",
    "again:１", "again:99999999999999999999",
    "drop:", "drop:1 OR 1=1",
    "ask::", "ask:0123456789abcdef:0", "ask:7:0123456789abcdef:0", "ask:7:0123456789abcdef:99", "ask:7:0123456789abcdef:0\0",
    "ask:7:" + "f" * 58,
    "say:7:/model x", "say:7:/stop 0123456789abcdef", "say:7:/model 0123456789abcdef\n", "model:7:0123456789abcdef",
]


@bot_with(WARM_SECONDS=0)  # or Bob's topic would get a session for what he writes next
def test_presses_that_were_forged_do_nothing(telegram, bot):
    bot.habits(prompt={"exit": 1, "times": 2})
    telegram.write("!say bob's", user=BOB)
    card = telegram.answer("exited", user=BOB)
    wait_state(bot, "offered")
    turn = telegram.find_button(card, "Ask")["callback_data"].partition(":")[2]
    telegram.write("!say alice's", thread=7)
    answer = telegram.answer("alice's", thread=7)
    wait_state(bot, "done")
    before = bot.database("SELECT * FROM inbox"), bot.database(), telegram.current(answer)
    for data in [*FORGED, f"again:{turn}", f"drop:{turn}"]:
        telegram.press(answer, data=data)
    telegram.press(answer, data="model:7:0")
    telegram.write("!say after", thread=8)
    telegram.answer("after", thread=8)
    assert (bot.database("SELECT * FROM inbox LIMIT 2"), bot.database("SELECT * FROM sessions LIMIT 2"),
            telegram.current(answer)) == before
    telegram.press(card, "Ask", user=BOB)
    telegram.answer("bob's", user=BOB)


@bot_with(HASTY, LOG_LEVEL="DEBUG", KIRO_API_KEY="k", HTTPS_PROXY="http://127.0.0.1:9")
@ahead
def test_the_token_is_nowhere(telegram, bot):
    secret = TOKEN.partition(":")[2]
    own = bot.environment()
    bot.environment = lambda: {**own, "BOT_TOKEN": TOKEN, "COPY": f"the token is {TOKEN}"}
    bot.restart(BOT_TOKEN=None)
    telegram.fault("download", drop="before")
    telegram.send_file("document", b"data", name="data.txt", caption="!junk\n!say with a file", thread=7)
    telegram.answer("with a file", thread=7)
    for fault in ({"drop": "before"}, {"status": 502, "html": True}, {"status": 500, "description": f"/bot{TOKEN}/x"}):
        telegram.fault("sendMessage", **fault)
        telegram.fault("getUpdates", **fault)
    telegram.write("/status", thread=7)
    telegram.answer("Session", thread=7)
    telegram.outage()
    bot.wait_log("can't be polled: ConnectionError")
    telegram.end_outage()
    telegram.write("!exit 3", thread=8)
    telegram.answer("exited", thread=8)
    starts = bot.wire("start")
    assert starts and all("environment" in entry["frame"] and secret not in json.dumps(entry) for entry in starts)
    passed_on = starts[0]["frame"]["environment"]
    assert (passed_on["KIRO_API_KEY"], passed_on["HTTPS_PROXY"]) == ("k", "http://127.0.0.1:9")
    assert " DEBUG " in bot.log() and secret not in bot.log()
    assert not [call for call in telegram.calls if secret in call.text]
    assert not [path for path in bot.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_what_others_should_not_read_they_cannot(telegram, make_bot):
    bot = make_bot()
    (bot.folder / ".env").chmod(0o644)
    sqlite3.connect(bot.folder / "tg-acp.db").close()
    (bot.folder / "tg-acp.db").chmod(0o666)
    bot.start()
    telegram.send_file("document", b"data", name="data.txt", caption="!file made.txt x\n!say done", thread=7)
    telegram.answer("done", thread=7)
    open_to_others = [f"{path} {oct(path.stat().st_mode)}" for path in bot.folder.rglob("*")
                      if path.stat().st_mode & 0o077]
    assert open_to_others == [f"{bot.workspace(7)}/made.txt 0o100644"]  # Kiro's own, as the bot's umask was at first
    assert (bot.workspace(7) / "uploads").is_dir()


# ---------------------------------------------------------------------------------------------------------
# The tests: files that come in
# ---------------------------------------------------------------------------------------------------------


def uploads(bot, thread=7):
    """Name and content of what was saved in the thread's workspace."""
    folder = bot.workspace(thread) / "uploads"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".gitignore"} if folder.is_dir() else {}


def wait_uploads(bot, count, thread=7):
    """Wait until Kiro has named so many files in its answers; returns what was saved."""
    bot.telegram.wait_until(lambda: sum(text.count("File: ") for text in bot.telegram.texts(thread)) >= count,
                            what=f"{count} files")
    return uploads(bot, thread)


def image_blocks_of(prompt):
    """The images in a prompt, given by its entry of the wire."""
    return [block for block in prompt["frame"]["params"]["prompt"] if block["type"] == "image"]


def base64_of(data):
    """What the record keeps of the base64 of `data`."""
    import base64
    return shortened(base64.b64encode(data).decode())


@ahead
def test_files_of_every_kind_are_saved_and_named(telegram, bot):
    kinds = ["document", "audio", "voice", "video", "video_note", "animation"]
    with telegram.batch_of_updates():
        for kind in kinds:
            telegram.send_file(kind, kind.encode(), caption=f"my {kind}", thread=7)
        telegram.send_file("photo", b"photo", sizes=((90, 60), (1280, 960), (2560, 1920)), thread=7)
    saved = wait_uploads(bot, 7)
    assert sorted(saved.values()) == sorted(kind.encode() for kind in kinds + ["photo"])
    prompts = "\n".join(bot.prompts())
    assert all(f"[File: {bot.workspace(7)}/uploads/{name}]" in prompts for name in saved)
    assert all(f"my {kind}\n" in prompts for kind in kinds)
    fetched = [call.params["file_id"] for call in telegram.find("getFile")]
    assert [file_id[:14] for file_id in fetched if "photo" in file_id] == ["photo-1280x960"]


@bot_with(dict(JOIN_SECONDS=0.3))
@ahead
def test_images_go_as_blocks_as_far_as_they_fit(telegram, bot):
    fits = [png(), png() + bytes(3_600_000), png() + bytes(3_600_001), png()]
    pictures = [png() + bytes(3_700_000), *fits[:3], png() + bytes(3_600_002), fits[3], b"no image"]
    telegram.album(*({"kind": "photo", "data": data} for data in pictures), caption="compare", thread=7)
    with telegram.batch_of_updates():
        for caption in ("these", "and those"):
            telegram.album(*[{"kind": "photo", "data": png()}] * 6, caption=caption, thread=9)
    prompt = bot.wait_prompt("compare", timeout=20)
    assert [len(block["data"]) for block in image_blocks_of(prompt)] == [len(base64_of(data)) for data in fits]
    assert sorted(uploads(bot).values()) == sorted(pictures)
    assert len(image_blocks_of(bot.wait_prompt("and those"))) == 10
    bot.habits(image=False)
    telegram.send_file("photo", png(), thread=8, caption="for the blind")
    assert not image_blocks_of(bot.wait_prompt("for the blind"))
    assert list(uploads(bot, 8).values()) == [png()]


@bot_with(dict(JOIN_SECONDS=0.3))
@ahead
def test_an_image_that_comes_as_a_file_is_shown_when_it_is_not_too_large(telegram, bot):
    jpeg = b"\xff\xd8\xff\xe0\0\x04ab\xff\xc0\0\x11\x08" + struct.pack(">HH", 1000, 2001) + bytes(10)
    pictures = [png(), png(2001, 1), png(1, 2000), jpeg, jpeg.replace(b"\x07\xd1", b"\x07\xd0")]
    telegram.album(*({"kind": "document", "data": data, "mime": "image/jpeg" if data[0] == 0xff else "image/png",
                      "name": f"{n}.img"} for n, data in enumerate(pictures)), caption="look", thread=7)
    shown = image_blocks_of(bot.wait_prompt("look"))
    assert [block["data"] for block in shown] == [base64_of(pictures[n]) for n in (0, 2, 4)]
    assert len(uploads(bot)) == len(pictures)


@ahead
def test_a_reply_to_a_file_brings_it_along_once(telegram, bot):
    report = telegram.send_file("document", b"report", name="report.txt", thread=7)
    picture = telegram.send_file("photo", png(), thread=7)
    telegram.answer("report.txt", thread=7)
    assert len(wait_uploads(bot, 2)) == 2
    elsewhere = telegram.send_file("document", b"from elsewhere", name="report.txt", user=ALICE)
    telegram.answer("report.txt", thread=None)
    with telegram.batch_of_updates():
        telegram.write("this?", thread=7, reply_to=report)
        telegram.write("and that?", thread=7, reply_to=picture)
        telegram.write("and the other?", thread=7, reply_to=elsewhere)
    prompt = bot.wait_prompt("the other?")
    text = prompt["frame"]["params"]["prompt"][0]["text"]
    assert f"> [File report.txt, 6 bytes]\n\nthis?\n[File: {bot.workspace(7)}/uploads/report.txt]" in text
    assert f"> [File report.txt, 14 bytes]\n\nand the other?\n[File: {bot.workspace(7)}/uploads/report-2.txt]" in text
    assert len(image_blocks_of(prompt)) == 1 and len(uploads(bot)) == 3


HOSTILE_NAMES = [
    "../../../etc/passwd", "..", "/etc/passwd", "C:\\windows\\a.exe", "uploads/../x",
    ".bashrc", "-rf", "-.hidden.txt", " ", "~",
    "a\nb\r\t.txt", "nul\0.txt", "annex\u202egpj.exe", "line\u2028end", "\u200b.txt",
    "a" * 300 + ".txt", "é" * 200, "x." + "y" * 300,
    "same.txt", "same.txt",
    'q"uo;t\'e$(x)`.txt', "😀.tar.gz",
]


@ahead
def test_hostile_file_names_are_made_harmless(telegram, bot):
    bot.workspace(7).joinpath("uploads").mkdir(parents=True)
    bot.workspace(7).joinpath("uploads", "same.txt").write_bytes(b"older")
    with telegram.batch_of_updates():
        for number, name in enumerate(HOSTILE_NAMES):
            telegram.send_file("document", b"%d" % number, name=name, thread=7)
    saved = wait_uploads(bot, len(HOSTILE_NAMES))
    assert sorted(saved.values()) == sorted([b"older"] + [b"%d" % number for number in range(len(HOSTILE_NAMES))])
    assert saved["same.txt"] == b"older"
    for name in saved:
        assert not name.startswith((".", "-", " ")) and len(name.encode()) <= 110, name
        assert name.isprintable() and not set(name) & set('/\\;"'), name
    assert len(list(bot.workspace(7).rglob("*"))) == len(saved) + 2  # the folder and its .gitignore
    assert all(c.isprintable() or c == "\n" for prompt in bot.prompts() for c in prompt)


def test_names_are_utf_8_whatever_the_locale(telegram, make_bot):
    bot = make_bot()
    own = bot.environment()
    bot.environment = lambda: {**own, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    bot.start()
    telegram.send_file("document", b"data", name="смета é.txt", caption="look", thread=7)
    telegram.answer("echo: look", thread=7)
    assert list(uploads(bot)) == ["смета é.txt"]


@bot_with(dict(RETRY_AT_MOST=0.1, GET_FILE_SECONDS=0.5))
@ahead
def test_files_that_cannot_be_had_are_named_and_the_rest_goes_on(telegram, bot):
    telegram.fault("download", status=500, when=lambda call: "voice" in call.params["path"])
    telegram.fault("download", drop="before", when=lambda call: "audio" in call.params["path"])
    with telegram.batch_of_updates():
        telegram.send_file("document", name="huge.iso", size=21 * MEGABYTE, thread=7)
        telegram.files[telegram.send_file("video", name="gone.mp4", thread=7)["video"]["file_id"]] = ("nowhere", b"", 1)
        telegram.files.pop(telegram.send_file("document", name="unknown.txt", thread=7)["document"]["file_id"])
        telegram.send_file("voice", thread=7)
        telegram.send_file("audio", name="song.mp3", thread=7)
        telegram.files["nowhere"] = ("other", b"", 1)
        telegram.send_file("document", b"good", name="good.txt", caption="look", thread=7)
    prompt = "\n".join(block.get("text", "") for block in bot.wait_prompt("good.txt]")["frame"]["params"]["prompt"])
    answer = telegram.answer("I could not get", thread=7)
    for name in ("huge.iso", "unknown.txt", "voice_", "song.mp3"):
        assert name in answer.text and f"send it again.\n{name}" in prompt
    assert "20 MB" in answer.text or "too big" in answer.text
    assert "look\n[File: " in prompt and b"good" in uploads(bot).values()
    telegram.answer("echo: ", thread=7)


def test_a_local_server_has_no_limit(telegram, bot, tmp_path):
    telegram.local = tmp_path
    telegram.send_file("document", b"really large", name="huge.iso", size=21 * MEGABYTE, thread=7)
    assert wait_uploads(bot, 1) == {"huge.iso": b"really large"}


@bot_with(dict(RETRY_AT_MOST=0.15, GET_FILE_SECONDS=1))
@ahead
def test_a_file_that_is_unavailable_for_a_moment_is_asked_for_again(telegram, bot):
    unavailable = "Bad Request: wrong file_id or the file is temporarily unavailable"
    telegram.fault("getFile", status=400, description=unavailable, times=2)
    telegram.send_file("document", b"precious", name="a.txt", thread=7)
    assert wait_uploads(bot, 1) == {"a.txt": b"precious"}
    telegram.fault("getFile", status=400, description=unavailable, times=None)
    telegram.send_file("document", b"gone", name="b.txt", thread=7)
    telegram.answer("\nb.txt: ", thread=7)
    assert 3 + 3 <= len(telegram.find("getFile", ok=None)) <= 3 + 8


@ahead
def test_a_download_that_was_cut_off_is_done_again(telegram, bot):
    fault = telegram.fault("download", hang=60)
    telegram.send_file("document", b"precious", name="a.txt", caption="read this", thread=7)
    telegram.wait_for("download", ok=None)
    bot.kill()
    fault.end()
    bot.start()
    bot.wait_prompt("read this")
    assert uploads(bot) == {"a.txt": b"precious"}
    telegram.answer("echo: read this", thread=7)


TRANSCRIBER = """#!/bin/sh
test -n "$BOT_TOKEN" && echo leaked
case "$(cat "$1")" in
    fine) echo "run the tests again";;
    silent) ;;
    broken) echo "model not found" >&2; exit 3;;
    endless) while :; do echo more and more; done;;
    hangs) setsid sleep 1000 & sleep 1000;;
esac
"""


@bot_with(dict(TRANSCRIBE_SECONDS=2, **QUICK), TRANSCRIBE_COMMAND="./transcribe")
@ahead
def test_what_is_said_in_a_voice_note_goes_to_kiro_and_is_shown(telegram, bot):
    def sleeps():
        for pid in bot.agents():
            with contextlib.suppress(OSError):  # it may end while it is looked at
                if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True

    bot.restart(TRANSCRIBE_COMMAND=str(bot.folder / "transcribe"))
    telegram.send_file("voice", b"fine", thread=1)
    missing = telegram.answer("could not be understood, so Kiro gets the file.\nvoice_", thread=1)
    assert "No such file" in missing.text
    telegram.answer("[File: ", thread=1)
    (bot.folder / "transcribe").write_text(TRANSCRIBER)
    (bot.folder / "transcribe").chmod(0o700)
    telegram.send_file("voice", b"fine", thread=1)
    assert telegram.answer("🎙 run the tests again", thread=1).params["disable_notification"]
    telegram.answer("echo: run the tests again\n[File: ", thread=1)
    troubles = [("silent", "no text within"), ("broken", "model not found"), ("endless", "no text"), ("hangs", "no text")]
    for thread, (content, _) in enumerate(troubles, 11):
        telegram.send_file("voice", content.encode(), thread=thread)
    for thread, (_, why) in enumerate(troubles, 11):
        assert "could not be understood" in telegram.answer(why, thread=thread).text
        telegram.answer("echo: [From the bot: 🎙 The voice note could not be understood", thread=thread)
    telegram.send_file("video_note", b"hangs", thread=3)
    telegram.wait_for(DRAFT, containing="Listening", thread=3)
    telegram.write("/stop", thread=3)
    telegram.answer("Stopped before Kiro began", thread=3)
    wait_until(lambda: not sleeps())
    telegram.send_file("video_note", b"hangs", thread=4)
    wait_until(sleeps)
    bot.stop()
    assert not bot.agents()


@ahead
def test_stop_ends_a_turn_that_still_downloads(telegram, bot):
    fault = telegram.fault("download", hang=60)
    telegram.send_file("document", b"slow", name="a.txt", thread=7)
    telegram.wait_for("download", ok=None)
    telegram.write("/stop", thread=7)
    telegram.answer("Stopped", thread=7)
    fault.end()
    wait_until(lambda: os.listdir(bot.workspace(7) / "uploads") == [".gitignore"], what="the end of the download")
    assert not bot.prompts()


def test_a_disk_that_takes_no_file_is_said(telegram, bot, tmp_path):
    for thread in (7, 8):
        bot.workspace(thread).mkdir(parents=True)
    bot.workspace(7).joinpath("uploads").write_text("in the way")
    bot.workspace(8).joinpath("uploads").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for thread in (7, 8):
        telegram.send_file("document", name="a.txt", caption="hello", thread=thread)
    for thread in (7, 8):
        assert "a.txt: " in telegram.answer("I could not get", thread=thread).text
        telegram.answer("echo: hello", thread=thread)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_cannot_be_passed_on_is_said_and_service_messages_are_none(telegram, bot):
    place = {"latitude": 1.5, "longitude": 2.5}
    sticker = {"type": "regular", "width": 1, "height": 1, "is_animated": False, "is_video": True}
    option = {"text": "yes", "voter_count": 0, "persistent_id": "1"}
    poll = {"id": "1", "question": "?", "options": [option], "total_voter_count": 0, "is_closed": False,
            "is_anonymous": True, "type": "regular", "allows_multiple_answers": False}
    lines = [{"location": place}, {"venue": {"location": place, "title": "x", "address": "y"}, "location": place},
              {"contact": {"phone_number": "1", "first_name": "x"}}, {"dice": {"emoji": "🎲", "value": 3}},
              {"poll": poll}, {"checklist": {"title": "x", "tasks": [{"id": 1, "text": "milk"}]}}]
    others = [{"sticker": telegram.new_file("sticker", b"x", **sticker)}, {"hologram": {"size": 3}}]
    services = [{"forum_topic_created": {"name": "x", "icon_color": 1}}, {"forum_topic_edited": {"name": "y"}},
                {"forum_topic_closed": {}}, {"delete_chat_photo": True},
                {"message_auto_delete_timer_changed": {"message_auto_delete_time": 86400}}]
    for content in services + others:
        telegram.post(thread=7, **content)
    telegram.wait_for(None, containing="I can't pass on this", thread=7, count=len(others))
    with telegram.batch_of_updates():
        for content in lines:
            telegram.post(thread=7, **content)
    said = telegram.answer("echo: ", thread=7).text.removeprefix("echo: ").split("\n\n")
    firsts = [list(content.items())[0] for content in lines]
    assert said == [f"[{kind}: {json.dumps(inside, ensure_ascii=False)}]" for kind, inside in firsts]
    assert len(telegram.texts()) == len(others) + 1
    assert len(bot.prompts()) == 1


def entity(kind, words, text, **more):
    """An entity over these words of a text, with offsets as Telegram counts them."""
    return {"type": kind, "offset": utf16_length(text.partition(words)[0]), "length": utf16_length(words), **more}


def with_entities(text, *entities, part="text"):
    """A message's text or caption with entities: (type, words, more)."""
    name = "entities" if part == "text" else "caption_entities"
    return {part: text, name: [entity(kind, words, text, **(more[0] if more else {})) for kind, words, *more in entities]}


def rich(*blocks):
    return {"rich_message": {"blocks": [{"type": "paragraph", "text": block} if isinstance(block, (str, list)) else block
                                        for block in blocks]}}


X = {"url": "https://x.org"}
CELLS = [[{"text": text, "align": "left", "valign": "top"} for text in row] for row in (("a", "b"), ("1", ["2", "3"]))]
AS_MARKDOWN = [
    (with_entities("🙂 see this 🙂 page", ("text_link", "this 🙂 page", X)), "🙂 see [this 🙂 page](https://x.org)"),
    (with_entities("bold link", ("bold", "bold link"), ("text_link", "link", X)), "bold [link](https://x.org)"),
    (with_entities("https://x.org", ("url", "https://x.org")), "https://x.org"),
    (with_entities("run ls now", ("code", "ls"), part="caption"), "run `ls` now"),
    (with_entities("a`b", ("code", "a`b")), "``a`b``"),
    (with_entities("look:\nx = 1\ny", ("pre", "x = 1", {"language": "python"})), "look:\n\n```python\nx = 1\n```\n\ny"),
    (with_entities("```", ("pre", "```")), "````\n```\n````"),
    (with_entities("he said\nno\n🙂", ("blockquote", "he said\nno"), ("code", "no")), "> he said\n> `no`\n\n🙂"),
    (rich(["plain, ", {"type": "bold", "text": "bold"}, " and ", {"type": "italic", "text": ["nested"]}], "the end"),
     "plain, bold and nested\nthe end"),
    (rich([{"type": "url", "text": "here", **X}, " ", {"type": "url", "text": X["url"], **X}, {"type": "code", "text": "f()"}]),
     "[here](https://x.org) https://x.org`f()`"),
    (rich([{"type": "mathematical_expression", "expression": "x^2"}, {"type": "custom_emoji", "alternative_text": "👍"}]),
     "$x^2$👍"),
    (rich({"type": "pre", "text": '{"type": "code", "n": 1}', "language": "json"}),
     '```json\n{"type": "code", "n": 1}\n```'),
    (rich({"type": "list", "items": [{"label": "1.", "blocks": [{"type": "paragraph", "text": "one"}]},
                                     {"label": "2.", "blocks": [{"type": "paragraph", "text": "two"}]}]}), "1. one\n2. two"),
    (rich({"type": "table", "cells": CELLS}), "| a | b |\n|---|---|\n| 1 | 23 |"),
    (rich({"type": "blockquote", "blocks": [{"type": "paragraph", "text": "deep"}], "credit": "him"}, {"type": "new"}),
     "> him\n> deep"),
    (rich({"type": "details", "summary": "more", "blocks": [{"type": "paragraph", "text": "inside"}]}), "more\ninside"),
    ({"photo": [], "caption": "mine"}, "mine"),
]


@pytest.mark.parametrize("message, markdown", AS_MARKDOWN)
def test_what_is_formatted_reaches_kiro_as_markdown(message, markdown):
    assert program.words(message) == markdown


def test_formatted_messages_captions_and_quotes_reach_kiro(telegram, bot):
    answer = telegram.post(thread=7, **rich("see ", {"type": "pre", "text": "x = 1"}))
    telegram.answer("x = 1", thread=7)
    quote = with_entities("a part", ("code", "part"))
    with telegram.batch_of_updates():
        telegram.write("why?", thread=7, reply_to=answer)
        telegram.post(thread=7, text="what?", quote=quote, external_reply={
            "origin": {"type": "channel", "date": 1, "message_id": 3, "chat": {"id": -1, "type": "channel", "title": "News"}}})
        telegram.send_file("photo", thread=7, live_photo={"new": 1}, **with_entities("live", ("code", "live"), part="caption"))
        telegram.post(thread=7, paid_media={"star_count": 1, "paid_media": []}, caption="paid")
    prompt = bot.wait_prompt("paid")["frame"]["params"]["prompt"][0]["text"]
    assert prompt == ("> see \n> \n> ```\n> x = 1\n> ```\n\nwhy?\n\n> [From News]\n> a `part`\n\nwhat?\n\n`live`\n[File: "
                      f"{bot.workspace(7)}/uploads/{next(iter(uploads(bot)))}]\n\npaid")


# ---------------------------------------------------------------------------------------------------------
# The tests: files that go out
# ---------------------------------------------------------------------------------------------------------


def in_workspace(bot, files, thread=7):
    """Put files, given as {name: content}, into a thread's workspace; returns it."""
    for name, content in files.items():
        path = bot.workspace(thread) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return bot.workspace(thread)


def tag(path, caption=""):
    """What Kiro writes to send a file."""
    return f'<send_file path="{path}">{caption}</send_file>'


def test_files_are_sent_as_what_they_are(telegram, bot):
    files = {"a.txt": b"text", "b.png": png(), "broken.png": b"\x89PNG\r\n\x1a\n", "strip.png": png(1, 30),
             "c d/ü;$'.md": b"odd", "long.txt": b"long", "it's.txt": b"apostrophe", "self.txt": b"self"}
    folder = in_workspace(bot, files)
    dictate(telegram, bot, "\n".join([
        "Before.", tag("a.txt", "a caption"), tag("b.png", "a picture"), tag("broken.png"), tag("strip.png"),
        tag("./c d/../c d/ü;$'.md"), tag(folder / "long.txt", "l" * 1500), tag("it's.txt"),
        "<send_file path = 'self.txt' />", "After."]), size=7)
    telegram.answer("l" * 1500, thread=7)
    telegram.wait_until(lambda: len(telegram.find(("sendPhoto", "sendDocument"))) >= len(files), what="all files")
    photos, documents = telegram.find("sendPhoto"), telegram.find("sendDocument")
    sent = photos + documents
    assert [call.files["photo"][1] for call in photos] == [png()]
    assert sorted(call.files["document"][1] for call in documents) == sorted(set(files.values()) - {png()})
    assert [call.text for call in sent if call.text] == ["a picture", "a caption"]
    assert all(call.thread == 7 for call in sent)
    text = telegram.answer("Before.", thread=7).text
    assert "After." in text and "send_file" not in text


@bot_with(dict(RETRY_AT_MOST=0.05))
def test_a_large_file_is_never_held_in_memory(telegram, bot):
    content = random.Random(1).randbytes(49 * MEGABYTE)
    in_workspace(bot, {"large": content})
    telegram.write("hello", thread=7)
    telegram.answer("echo: hello", thread=7)
    telegram.fault("sendDocument", status=502, html=True)
    dictate(telegram, bot, tag("large", "a caption: ü 😀\n--"))
    sent = telegram.wait_for("sendDocument", timeout=20)
    assert sent.files["document"] == ("large", content) and sent.text == "a caption: ü 😀\n--"
    assert bot.status("VmHWM") < 60 * 1024


def test_a_file_that_grows_while_it_is_sent_has_an_end(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a" * 100_000)
    with open(path, "rb") as file:
        body, content_type = program._multipart({"chat_id": 1}, "document", ("a", file))
        path.write_bytes(b"a" * 10_000_000)
        _, files = form_fields(content_type, b"".join(body))
    assert 100_000 <= len(files["document"][1]) < 200_000


def test_what_kiro_shows_beside_the_text_is_shown(telegram, bot):
    import base64
    folder, picture = in_workspace(bot, {"c d.txt": b"linked"}), base64.b64encode(png()).decode()
    blocks = [{"type": "image", "mimeType": "image/png", "data": picture},
              {"type": "resource_link", "uri": f"file://{folder}/c%20d.txt", "name": "c d.txt"},
              {"type": "resource_link", "uri": "https://example.com/x", "name": "a page"},
              {"type": "resource", "resource": {"uri": "file:///x", "text": "embedded"}},
              {"type": "resource_link", "uri": "file:///etc/hostname", "name": "host"},
              {"type": "image", "mimeType": "image/png", "data": "x"}, {"type": "image", "mimeType": [], "data": {}}, {"type": "text", "text": {}},
              {"type": "resource", "resource": []}, {"type": "resource_link", "uri": "http://[", "name": {}}]
    telegram.write("\n".join(["!say Look:", *(f"!block {json.dumps(block)}" for block in blocks), "!say the end"]), thread=7)
    told = [telegram.answer(text, thread=7).text for text in ("Look:", "sent.\nIt is outside", "image.png, but it can't be sent.\n")]
    assert "[a page](https://example.com/x)" in told[0] and "embedded" in told[0] and "the end" in told[0]
    assert [call.files["photo"][1] for call in telegram.find("sendPhoto")] == [png()]
    assert [call.files["document"] for call in telegram.find("sendDocument")] == [("c d.txt", b"linked")]
    telegram.write(f"!block {json.dumps(blocks[0])}", thread=7)
    telegram.wait_for("sendPhoto", count=2)
    wait_state(bot, "done", 2)
    assert not telegram.find(containing="without saying")


def test_get_sends_a_file_without_a_turn(telegram, bot):
    in_workspace(bot, {"a b.txt": b"hello"})
    telegram.write("/get a b.txt", thread=7)
    assert telegram.wait_for("sendDocument", thread=7).files["document"] == ("a b.txt", b"hello")
    for path, why in (("/etc/passwd", "outside of this topic's folder"), ("../../..", "outside"), ("", "not a regular file"),
                      ("none", "there is no such file"), (".", "not a regular file"), ("x\0y", "can't be sent"), ("x" * 300, "File name too long")):
        assert why in ask(telegram, f"/get {path}")
    assert not bot.prompts()
    settle(bot)


def test_files_that_must_not_be_sent_are_refused(telegram, bot, tmp_path):
    folder = in_workspace(bot, {"empty": b"", "fine.txt": b"fine", "huge": b"h"})
    (tmp_path / "secret").write_text("SECRET")
    os.truncate(folder / "huge", 2001 * MEGABYTE)
    os.mkfifo(folder / "fifo")
    for name, target in {"link": tmp_path / "secret", "dir": tmp_path, "zero": "/dev/zero", "loop": "loop",
                         "out": bot.folder / ".env"}.items():
        (folder / name).symlink_to(target)
    bad = ["/etc/hostname", "../../../.env", "../8/x", "link", "dir/secret", "zero", "/dev/zero", "fifo", "loop", "out",
           "missing", "missing/x", ".", "fine.txt/x", "", "huge", "empty", "~/x", "x" * 300]
    dictate(telegram, bot, "Here:\n" + "\n".join(map(tag, bad)) + tag("fine.txt"), size=3000)
    telegram.wait_for("sendDocument", thread=7)
    telegram.wait_for(containing="Kiro wanted to send", thread=7, count=len(bad))
    assert [call.files["document"][1] for call in telegram.find("sendDocument")] == [b"fine"]
    told = telegram.texts(containing="Kiro wanted to send")
    assert "outside" in told[0]
    assert all(reason in "".join(told) for reason in ("there is no such file", "regular file", "larger", "must be non-empty"))
    telegram.write("what now?", thread=7)
    telegram.answer("echo: what now?", thread=7)
    assert all(f"{path}: " in bot.prompts()[-1] for path in bad)


def test_a_path_with_a_nul_harms_nobody(telegram, bot):
    dictate(telegram, bot, "Here: " + tag("a\0b"))
    telegram.answer("but ", thread=7)
    telegram.write("next", thread=7)
    telegram.answer("echo: next", thread=7)


@ahead
def test_refused_folders_leave_no_descriptors(telegram, bot):
    in_workspace(bot, {"d/x": b""})
    telegram.write("hello", thread=7)
    telegram.answer("echo: hello", thread=7)
    wait_until(lambda: "session/load" in str(bot.wire("in", "session/load")))
    before = bot.fds()
    dictate(telegram, bot, tag("d") * 30)
    telegram.wait_for(containing="Kiro wanted to send", thread=7, count=30)
    bot.wait_wire("in", "session/load", count=2)
    assert bot.fds() < before + 15


def test_a_folder_that_becomes_a_link_at_the_last_moment_is_noticed(tmp_path, monkeypatch):
    workspace, real_open = tmp_path / "workspace", os.open
    (workspace / "d").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for folder in (workspace / "d", tmp_path / "outside"):
        (folder / "f").write_text("x")

    def swap_and_open(path, *args, **kwargs):
        if (workspace / "d").exists() and not (workspace / "d").is_symlink():
            (workspace / "d").rename(workspace / "old")
            (workspace / "d").symlink_to(tmp_path / "outside")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(program.os, "open", swap_and_open)
    with pytest.raises(ValueError):
        program._open_inside("d/f", str(workspace))


def test_a_tag_in_a_sentence_about_tags_is_text(telegram, bot):
    sentence = f"To send a file I write {tag('nothing.pdf', 'it')}."
    assert recite(telegram, bot, sentence) == [sentence]
    in_workspace(bot, {"a.txt": b"a"})
    dictate(telegram, bot, f"Here {tag('a.txt')} is it.\nAnd {tag('gone.txt')}")
    telegram.answer("Kiro wanted to send gone.txt", thread=7)
    assert len(telegram.find("sendDocument")) == 1


@ahead
def test_tags_in_code_are_text(telegram, bot):
    in_workspace(bot, {"a.txt": b"a"})
    text = (f"Write `{tag('a.txt')}` or ``{tag('a.txt', '`')}``:\n\n```html\n{tag('a.txt')}\n```\n\n"
            f"~~~\n{tag('a.txt')}\n~~~\n\n````\n```\n{tag('a.txt')}")
    for size in (1, 1000):
        dictate(telegram, bot, text, size)
        assert telegram.wait_for("sendRichMessage", thread=7, count=1 if size == 1 else 2).text.count(tag("a.txt")) == 4
    dictate(telegram, bot, f"1. In an item:\n   - ```html\n     a\n\n     {tag('a.txt')}\n     ```\n\n"
                           f"> ```\n> {tag('a.txt')}\n> ```\n\nDone.")
    assert telegram.answer("Done.", thread=7).text.count(tag("a.txt")) == 2
    assert not telegram.find("sendDocument")


ODD_TAGS = [
    "See <send_file path=a.txt>cap</send_file> and more.",
    "The <send_file_size> setting, and more.",
    "Use <send_file and more.",
    '<send_file path="a.txt" caption="x">c</send_file> and more.',
    '<send_file path="a.txt">never closed, and more.',
    '<send_file path="a"><send_file path="b">x</send_file>y</send_file> and more.',
    "</send_file> and more.",
]


@pytest.mark.parametrize("text", ODD_TAGS)
def test_odd_tags_swallow_nothing(text):
    assert "and more." in program.visible_text(text)[0]


TAGGED = (f"Here: {tag('a.txt', 'the caption')} it is, `{tag('b')}` {tag('c')}.\n```\n{tag('d')}\n```\n"
          f"<send_file\n path='e' />{tag('f', 'x `y` <z>')}!")


def test_no_prefix_of_an_answer_shows_a_piece_of_a_tag():
    final, files = program.visible_text(TAGGED)
    assert [path for path, _ in files] == ["a.txt", "c", "e", "f"]
    for end in range(len(TAGGED)):
        shown = program.visible_text(TAGGED[:end], still_coming=True)[0]
        outside = without_code(shown)
        assert "<" not in outside and "the caption" not in outside and "file" not in outside, shown


def hostile_texts(length=100_000):
    """Texts that patterns choke on, by name: what is repeated, or begins and never ends."""
    def fill(piece):
        return (piece * (length // len(piece) + 1))[:length]

    cited = fill("[1](https://example.com/1), ")
    texts = {piece: fill(piece) for piece in (
        "[", "](", "[`", "[x]: u\n", "<", "<http://a", "`", "` a\n", "*", "_a ", "> > > >\n", "a|b\n-|-\n", "|`a|b` ",
        "  - a\n", "-\n", "https://a.b/((", "session ", " ", "😀", '<send_file path="', '<send_file path="a"> ', '](a "', "[``[` ",
        "[\\", "~~a", "`a``b```c", "<send_file path=a", "[a]: b\n[a]")}
    return {**texts, "citations": f"Sources: [{cited}]", "growing runs": " a ".join("`" * n for n in range(1, 440)),
            "tag and blanks": '<send_file path="a"' + fill(" "), "cells and blanks": fill("|" + " " * 1000 + "a\n"),
            "link and blanks": "[a](b" + fill(" ") + "c", "rule": "|a|\n|" + fill("- -"), "not": "not" + fill(" "),
            "parentheses": "[a](" + fill("()")}


def time_hostile_texts():
    """Runs what looks into texts on each of them; prints what took long.  In a process of its own: it may never end."""
    functions = [lambda text: program.visible_text(text, still_coming=True), program.has_markdown, program.plain_form,
                 program.rich_safe, lambda text: list(rich_pieces(text)), program.LOST.search, program.NOT_LOGGED_IN.search,
                 program.PASSING.search, program.LOCKED.search]
    for name, text in hostile_texts().items():
        for number, function in enumerate(functions):
            begun = time.process_time()
            function(text)
            if time.process_time() - begun > 1:
                print(f"{name!r}, function {number}: {time.process_time() - begun:.1f} s")
    for function in (program.in_plain_sight, lambda text: program.tail(text, 4000)):
        function("😀" * 50_000)


@pytest.fixture(scope="session", autouse=True)
def timing_of_hostile_texts(request):
    """The process that times them, from the run's start on: it needs a processor for longer than any test, but not soon."""
    if not wanted(request):
        yield
        return
    code = "import os; os.nice(5); import test_sessions; test_sessions.time_hostile_texts()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as timing:
        yield timing
        timing.kill()


def test_hostile_texts_take_no_time(timing_of_hostile_texts):
    told, errors = timing_of_hostile_texts.communicate(timeout=90)
    assert (timing_of_hostile_texts.returncode, told) == (0, ""), errors


@bot_with(QUICK)
def test_drafts_never_show_a_tag_that_arrives_in_pieces(telegram, bot):
    for user, text in ((ALICE, "Draft one <send_fi"), (BOB, "Draft two " + tag("x", "the caption")[:-3])):
        telegram.write(f"!say {text}\n!wait gate\n!say rest", user=user, thread=7)
    for user, text in ((ALICE, "Draft one"), (BOB, "Draft two")):
        assert telegram.wait_for(DRAFT, containing=text, user=user).text.strip() == text
    bot.open_gate("gate")
    telegram.answer("Draft one <send_firest", user=ALICE)
    telegram.answer("Draft two", user=BOB)


# ---------------------------------------------------------------------------------------------------------
# The tests: permissions
# ---------------------------------------------------------------------------------------------------------


def question(telegram, containing, thread=7, **which):
    """Wait for a permission request; returns the call that asked."""
    return telegram.wait_for("sendMessage", containing=containing, thread=thread,
                             when=lambda call: "reply_markup" in call.params, **which)


def settled(telegram, call, text):
    """Wait until a question has this outcome and no buttons any more."""
    telegram.wait_until(lambda: text in telegram.current(call)["text"] and not telegram.buttons(call),
                        what=f"the outcome {text!r}")


def toast(telegram, query):
    """Wait for the answer to a press; returns its text."""
    return telegram.wait_for("answerCallbackQuery",
                             when=lambda call: call.params["callback_query_id"] == query["id"]).text


def patched_kiro(folder, code):
    """A KIRO_COMMAND for the stand-in with a change in it; `code` sees the module as `k`."""
    (folder / "agent.py").write_text(f"import test_sessions as k\n{code}\nk.StandInKiro().run()\n")
    return shlex.join([sys.executable, str(folder / "agent.py")])


def test_each_option_of_a_permission_is_a_button(telegram, bot):
    telegram.write("!ask Running: make one\n!ask Running: make two\n"
                   "!tool edit Editing notes/todo.md\n!ask\n!say the end", thread=7)
    styles = {"Yes": "success", "No": "danger"}
    for title, button, kind in (("make one", "Yes", "allow_once"),
                                ("make two", "Always", "allow_always"),
                                ("notes/todo.md", "No", "reject_once")):
        asked = question(telegram, title)
        [row] = asked.params["reply_markup"]["inline_keyboard"]
        assert [(b["text"], b.get("style")) for b in row] == [(name, styles.get(name)) for name in ("Yes", "Always", "No")]
        assert not asked.params.get("disable_notification")
        assert button in toast(telegram, telegram.press(asked, button))
        settled(telegram, asked, f"→ {button}")
        assert title in telegram.current(asked)["text"]
        bot.wait_wire("in", when=lambda entry: f"'optionId': '{kind}'" in str(entry["frame"]))
    told = [line for line in telegram.answer("the end", thread=7).text.splitlines() if line.startswith("perm")]
    assert told == ["permission: allow_once", "permission: allow_always", "permission: reject_once"]


@ahead
def test_stop_and_the_end_of_the_turn_refuse_what_was_asked(telegram, bot):
    asked = {}
    for thread in (1, 2, 3):
        telegram.write("!ask Running: make", thread=thread)
        asked[thread] = question(telegram, "make", thread)
    telegram.stop(telegram.wait_for(DRAFT, thread=1))
    telegram.write("/stop", thread=2)
    for thread in (1, 2):
        settled(telegram, asked[thread], "Refused: stopped")
        telegram.answer("Stopped", thread=thread)
    for pid in bot.agents():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    settled(telegram, asked[3], "Refused: the turn is over")
    for thread in (1, 2, 3):
        [[first, *_], *_] = asked[thread].params["reply_markup"]["inline_keyboard"]
        late = telegram.press(asked[thread], data=first["callback_data"])
        assert toast(telegram, late) == "This is over."
    assert len(bot.wire("in", when=lambda e: "'outcome': 'cancelled'" in str(e["frame"]))) == 2


@ahead
def test_a_stop_does_not_wait_until_many_questions_are_asked(telegram, bot):
    first, second = (telegram.fault("sendMessage", hang=10, when=lambda call, n=n: f"do {n}." in call.text) for n in (0, 20))
    telegram.write("!ask_many 30\n!silence", thread=7)
    bot.wait_wire("out", "session/request_permission", count=30)
    first.end()
    telegram.wait_for("sendMessage", containing="do 20.", ok=None)
    tell(telegram, "/stop", 8, "Nothing is running")
    telegram.write("/stop", thread=7)
    wait_until(lambda: len(states(bot)) == 3)
    second.end()
    telegram.answer("Stopped", thread=7)
    assert not telegram.texts(7, containing="do 29.")
    goes_on(telegram, 7)


@pytest.mark.parametrize("constants, others", [(dict(PERMISSION_SECONDS=0.5), []),
                                               (dict(PERMISSION_SECONDS_IN_DEMAND=0.3, DEAF_SECONDS=0.4), [8])])
@bot_with(MAX_PROCESSES=1)
@ahead
def test_nobody_is_waited_for_without_end_and_less_long_while_others_wait(telegram, bot, constants, others):
    bot.hurry(**constants).restart()
    telegram.write("!ask Running: make", thread=7)
    asked = question(telegram, "make")
    for thread in others:
        telegram.write("!say my turn", thread=thread)
    settled(telegram, asked, "Refused: nobody answered")
    telegram.answer("permission: reject_once", thread=7)
    for thread in others:
        telegram.answer("my turn", thread=thread)


SLOW_TO_ACT = """
def act_on(self, kind, act=k.PlayedTurn.act_on):
    self.agent.wait_for_gate("act", self.pause)
    act(self, kind)
k.PlayedTurn.act_on = act_on
"""


@bot_with(dict(TOOL_PATIENCE=0.7), SILENCE_SECONDS=2)
@ahead
def test_the_clock_of_silence_stands_while_a_question_is_open_and_starts_anew_with_the_decision(telegram, bot):
    bot.restart(KIRO_COMMAND=patched_kiro(bot.control, SLOW_TO_ACT))
    telegram.write("!ask Running: make\n!say and so on", thread=7)
    asked = question(telegram, "make")
    tell(telegram, "!tool execute Running: tests\n!silence", 8, "⚠️ Kiro said nothing")  # so long it is
    telegram.press(asked, "Yes")
    settled(telegram, asked, "→ Yes")
    bot.open_gate("act")
    assert telegram.answer(thread=7, after=asked).text == "permission: allow_once\nand so on"


DIFF = {"sessionUpdate": "tool_call_update", "toolCallId": "t1", "title": "Editing", "kind": "edit", "status": "completed",
        "content": [{"type": "diff", "path": "src/a.py", "oldText": "one\ntwo\n", "newText": "one\n``` 2 & <b>\nthree\n"}]}
DELETED = {"sessionUpdate": "tool_call", "toolCallId": "t2", "title": "Deleting b", "kind": "delete", "status": "completed",
           "locations": [{"path": "b"}], "content": {}}


def update(session_update, **more):
    """The directive that sends this update as it is."""
    params = {"update": {**session_update, **more}}
    return "!raw " + json.dumps({"jsonrpc": "2.0", "method": "session/update", "params": params}) + "\n"


@ahead
def test_what_was_changed_is_counted_and_can_be_looked_at(telegram, bot):
    telegram.write(update(DIFF) + update(DELETED) + update(DIFF, toolCallId="t3", status="failed", content=[])
                   + update(DIFF, toolCallId="t4", content=[])      # names no file
                   + "!credits 0.5 0.25\n!say Both **done**.", thread=7)
    answer = telegram.answer("Both", thread=7)
    assert re.fullmatch(r"Both \*\*done\*\*\.\n\n\d s · 1 step · 2 files · 0.75 credits", answer.text)
    assert offers(telegram, answer) == ["Changes"]
    toast(telegram, telegram.press(answer, "Changes"))
    shown = telegram.answer("src/a.py", thread=7)
    assert shown.text == "src/a.py  +2 -1\n- two\n+ ``` 2 & <b>\n+ three\n\nb  +0 -0"
    [code] = shown.params["entities"]
    assert (code["type"], code["offset"], code["length"]) == ("pre", 0, len(shown.text))
    ask(telegram, "!say nothing changed")
    assert command(telegram, (answer, "Changes")).text == "This is over."
    five_mb = [{"type": "diff", "path": "big.txt", "oldText": "a\n" * 1_200_000, "newText": "b\n" * 1_200_000}]
    bot.control_file("big", update(DIFF, content=five_mb)[5:])
    telegram.write("!raw_file big\n!say big", thread=7)
    big = telegram.answer("big", thread=7)
    telegram.press(big, "Changes")
    [(name, data)] = telegram.wait_for("sendDocument", thread=7, timeout=20).files.values()
    assert name == "changes.diff" and data.startswith(b"big.txt  +1200000 -1200000\n- a\n") and len(data) < 3 * 2**20
    bot.restart()
    assert command(telegram, (big, "Changes")).text == "This is over."


@bot_with(dict(LONG_SECONDS=0.1, **QUICK))
@ahead
def test_a_turn_that_took_long_says_what_it_took(telegram, bot):
    telegram.write("!tool read Reading\n!tool_done\n!sleep 0.2\n!say here", thread=7)
    assert telegram.answer("here", thread=7).text == "here\n\n0 s · 1 step · 0.03 credits"
    telegram.write("!say part\n!silence", thread=7)
    telegram.wait_for(DRAFT, containing="part")
    time.sleep(0.1)
    telegram.write("/stop", thread=7)
    assert telegram.answer("part", thread=7).text.startswith("part\n\n⏹ Stopped.\n\n")
    closing = program.Answer()
    closing.credits = 1.23456
    assert closing._closing(95.4) == "1 m 35 s · 1.235 credits" and closing._closing(0.05) == ""


@ahead
def test_only_the_first_press_of_the_right_person_counts(telegram, bot):
    telegram.write("!ask Running: first", thread=7)
    telegram.write("!ask Running: second", thread=8)
    first, second = question(telegram, "first", 7), question(telegram, "second", 8)
    data = telegram.buttons(second)[1]["callback_data"]
    telegram.press(second, "Always", user=MALLORY)
    telegram.write("!ask Running: Bob's", user=BOB, thread=7)
    of_bob = question(telegram, "Bob's", 7, user=BOB)
    assert toast(telegram, telegram.press(of_bob, user=BOB, data=data)) == "This is over."
    for forged in (data[:-1] + "9", data[:-1] + "77", "ask:", "nonsense", "a" * 64):
        telegram.press(second, data=forged)
    queries = [telegram.press(second, "No"), telegram.press(second, "Yes")]
    assert "No" in toast(telegram, queries[0]) and toast(telegram, queries[1]) == "This is over."
    settled(telegram, second, "→ No")
    telegram.press(first, "Yes")
    telegram.answer("permission: allow_once", thread=7)
    telegram.answer("permission: reject_once", thread=8)
    assert not telegram.texts(thread=7, user=BOB, containing="permission:")


def test_what_is_asked_outside_a_turn_is_refused_silently(telegram, bot):
    telegram.write("!late_ask\n!say first", thread=7)
    telegram.answer("first", thread=7)
    bot.wait_wire("out", "elicitation/create")
    telegram.write("second", thread=7)
    telegram.answer("echo: second", thread=7)
    assert telegram.texts() == ["first", "echo: second"]


class Answering:
    """Answers what is asked in a topic, question by question."""

    def __init__(self, telegram, thread=7):
        self.telegram, self.thread, self.last = telegram, thread, None

    def __call__(self, containing, answer, *labels):
        """Wait for the next question; press the button of this name, or write the answer."""
        asked = question(self.telegram, "", self.thread, after=self.last)
        assert containing in asked.text and not (labels and offers(self.telegram, asked) != list(labels))
        if answer in offers(self.telegram, asked):
            assert toast(self.telegram, self.telegram.press(asked, answer)) == f"→ {answer}"
        else:
            self.telegram.write(answer, thread=self.thread)
        settled(self.telegram, asked, f"→ {answer}")
        self.last = asked
        return asked


COLOURS = {"type": "string", "oneOf": [{"const": "r", "title": "Red"}, {"const": "g", "title": "Green"}]}
AGE = {"type": "integer", "minimum": 1, "maximum": 10}
NAME = {"type": "string", "title": "Your name", "minLength": 2, "maxLength": 5, "pattern": "(a|a)*b"}
SIZE = {"type": "string", "enum": ["S", "M", "L", "a very large one"], "description": "of the shirt"}


@ahead
def test_what_kiro_wants_to_know_is_asked_with_buttons_and_in_words(telegram, bot):
    answer = Answering(telegram)
    telegram.write(elicit("Colour?", {"colour": COLOURS}, ["colour"]) + elicit("Sure?", {"sure": {"type": "boolean"}})
                   + elicit("Age?", {"age": AGE}, ["age"]) + elicit("Any?", {"any": {"type": "string"}}) + "!say end", thread=7)
    first = answer("❓ Kiro asks: Colour?\ncolour", "Green", "Red", "Green", "Decline")
    assert len(first.params["reply_markup"]["inline_keyboard"]) == 1
    answer("Sure?", "Yes", "Yes", "No", "Skip", "Decline")
    wanted = "age\nYour next message is the answer: a whole number, from 1, up to 10."
    answer(f"❓ Kiro asks: Age?\n{wanted}", "eleven", "Decline")
    for text in ("11", "0", "1.5", "1e999", "9" * 4000, "7"):
        answer(f"⚠️ That does not fit.\n{wanted}", text)
    answer("Any?", "Skip", "Skip", "Decline")
    assert telegram.answer("end", thread=7).text.splitlines() == [
        'elicited: accept {"colour": "g"}', 'elicited: accept {"sure": true}', 'elicited: accept {"age": 7}',
        "elicited: accept {}", "end"]
    assert len(bot.prompts()) == 1
    assert ask(telegram, "and now?") == "echo: and now?"
    settle(bot)


def test_several_fields_are_asked_one_after_the_other_and_shown_before_they_are_sent(telegram, bot):
    answer = Answering(telegram)
    rate = {"type": "number", "minimum": 0, "maximum": None}
    form = elicit("Order?", {"name": NAME, "size": SIZE, "rate": rate}, ["name", "size"])
    telegram.write(form + form + elicit("Go on?", {}) + "!say end", thread=7)
    first = answer("Order?\nYour name\nYour next message is the answer: a text, at least 2 characters, at most 5 characters, "
                   "of the form (a|a)*b.", "a" * 4000)
    assert "Your name" in answer("That does not fit", "aab").text
    size = question(telegram, "of the shirt", after=first)
    with telegram.batch_of_updates():  # of two presses the first counts, and the second does not answer the next field
        queries = [telegram.press(size, "S"), telegram.press(size, "M")]
    assert [toast(telegram, query) for query in queries] == ["→ S", "This is over."]
    settled(telegram, size, "→ S")
    answer.last = size
    answer("rate\nYour next message is the answer: a number, from 0.", "-1", "Skip", "Decline")
    answer("That does not fit", "2.5")
    answer("❓ Kiro asks: Order?\nname: aab\nsize: S\nrate: 2.5", "Send", "Send", "Decline")
    answer("Order?", "bb")
    answer("of the shirt", "L", "S", "M", "L", "a very large one", "Decline")
    answer("rate", "Skip")
    answer("❓ Kiro asks: Order?\nname: bb\nsize: L", "Decline")
    answer("Go on?", "Send")
    assert telegram.answer("elicited", thread=7).text.splitlines() == [
        'elicited: accept {"name": "aab", "size": "S", "rate": 2.5}', "elicited: decline null", "elicited: accept {}", "end"]


@bot_with(dict(JOIN_SECONDS=0.3))
@ahead
def test_an_address_is_opened_only_when_it_shows_where_it_leads(telegram, bot):
    answer = Answering(telegram)
    telegram.write(elicit("Sign in", mode="url", url="https://id.test/a?b=c%20d#e")
                   + elicit("More", mode="url", url="https://x.test") + "!say end", thread=7)
    asked = answer("❓ Kiro asks: Sign in\nIt wants you to open id.test:\nhttps://id.test/a?b=c%20d#e", "Done",
                   "Open id.test", "Done", "Decline")
    assert asked.params["reply_markup"]["inline_keyboard"][0][0]["url"] == "https://id.test/a?b=c%20d#e"
    answer("https://x.test", "Decline")
    assert telegram.answer("end", thread=7).text.splitlines()[:2] == ["elicited: accept null", "elicited: decline null"]
    deep = {"type": "string"}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {f"f{n}": {"type": "string"} for n in range(1000)}
    odd = {"type": "string", "oneOf": [1, {"const": []}, {"title": {}, "const": None}, {}]}
    telegram.write(elicit("deep", {"a": deep}) + elicit("wide", wide) + elicit("odd", {"x": odd}) + "!say done", thread=7)
    answer("wide\nf0", "Decline")
    telegram.press(question(telegram, "odd\nx"), "None")
    telegram.answer('elicited: decline null\nelicited: decline null\nelicited: accept {"x": null}\ndone', thread=7)


@bot_with(dict(PERMISSION_SECONDS=2))
@ahead
def test_stop_time_and_the_end_of_the_turn_cancel_a_form(telegram, bot):
    form = elicit("Name?", {"name": {"type": "string"}, "more": {"type": "string"}})
    telegram.write(form + "!say end", thread=7)
    telegram.write(form + "!say end", thread=8)
    for thread in (7, 8):
        asked = question(telegram, "Name?", thread)
        telegram.write("Ann", thread=thread)
        settled(telegram, asked, "→ Ann")
    second = question(telegram, "more", 8)
    telegram.write("/stop", thread=8)
    settled(telegram, second, "Refused: stopped")
    telegram.answer("Stopped", thread=8)
    settled(telegram, question(telegram, "more", 7), "Refused: nobody answered")
    telegram.answer("elicited: cancel null\nend", thread=7)
    telegram.write("next", thread=8)
    telegram.answer("echo: next", thread=8)


def test_a_question_may_be_answered_before_telegram_has_confirmed_it(telegram, bot):
    fault = telegram.fault("sendMessage", hang=10)
    telegram.write(elicit("Name?", {"name": {"type": "string"}}) + "!say end", thread=7)
    asked = question(telegram, "Name?")
    acknowledged = telegram.write("Ann", thread=7)
    telegram.wait_until(lambda: telegram.is_acknowledged(acknowledged))
    fault.end()
    settled(telegram, asked, "→ Ann")
    telegram.answer('elicited: accept {"name": "Ann"}', thread=7)


def test_a_question_that_cannot_be_shown_is_told_with_the_answer(telegram, bot):
    many = {"type": "string", "enum": [f"option {n}" for n in range(150)]}
    telegram.write(elicit("Which?", {"x": many}) + "!say end", thread=7)
    told = telegram.answer("so it was refused. Ask Kiro to do it in another way.\n❓ Kiro asks: Which?\nx\n400 Bad", thread=7)
    assert told.params["disable_notification"]
    telegram.answer("elicited: cancel null\nend", thread=7)


def test_a_server_that_knows_no_colours_gets_none(telegram, bot):
    telegram.fault("sendMessage", status=400, description="Bad Request: field style is unknown", times=None,
                   when=lambda call: "style" in json.dumps(call.params.get("reply_markup", {})))
    answer = Answering(telegram)
    telegram.write("!ask Running: make one\n!ask Running: make two\n!say end", thread=7)
    answer("make one", "Yes", "Yes", "Always", "No")
    answer("make two", "No")
    telegram.answer("end", thread=7)
    assert len(telegram.find("sendMessage", ok=False)) == 2


ODD_OPTIONS = """
def update(self, update, old=k.PlayedTurn.update):
    if "rawInput" in update:
        update.update(title="Clean up", rawInput={"command": "rm -rf ~"})
    old(self, update)
k.PlayedTurn.update = update
k.PlayedTurn.options = lambda self: [dict(optionId=7, name="Always allow " + 9 * "word " + "to the end", kind="allow_always"),
                               dict(optionId="x" * 99, name=" ", kind="odd")]
"""


def test_the_command_itself_is_shown_and_odd_options_do_no_harm(telegram, make_bot, tmp_path):
    make_bot(KIRO_COMMAND=patched_kiro(tmp_path, ODD_OPTIONS)).start()
    telegram.write("!ask Running: something harmless", thread=7)
    asked = question(telegram, "rm -rf ~")
    assert "Clean up" in asked.text and len(telegram.buttons(asked)) == 2
    assert asked.text.endswith("word to the end")  # which its button does not show
    telegram.press(asked, 0)
    telegram.answer("permission: allow_always", thread=7)


QUESTIONS = [
    ({"title": "Running: npm test", "kind": "execute", "rawInput": {"command": "npm test"}}, "Running: npm test"),
    ({"title": "Running", "rawInput": {"command": ["rm", "-rf", "/"]}}, "Running\ncommand: [\"rm\", \"-rf\", \"/\"]"),
    ({"title": "Running: @postgres/execute_sql", "rawInput": {"sql": "DROP TABLE x", "limit": {"rows": 3}}},
     'Running: @postgres/execute_sql\nsql: DROP TABLE x\nlimit: {"rows": 3}'),
    ({"title": "src/a.py", "kind": "edit", "locations": [{"path": "src/a.py"}, {"path": "/b"}, 7], "content": [
        {"type": "diff", "path": "src/a.py", "oldText": "same\nold\nend", "newText": "same\nnew\nend"}, 3,
        {"type": "content", "content": {"type": "text", "text": "and so on"}}]},
     "src/a.py (edit)\nsrc/a.py\n- old\n+ new\nand so on\n/b"),
    ({"title": "write", "kind": "edit", "content": [{"type": "diff", "path": "n", "newText": "all\nnew"}]},
     "write (edit)\nn\n+ all\n+ new"),
    ({"title": "read\u202e\0", "rawInput": "what\u200b"}, "read\\u202e\\u0000\nwhat\\u200b"),
    ({"title": ["odd"], "kind": {}, "rawInput": [1], "content": "x", "locations": {}}, "['odd']\n[1]"),
    ({"title": "Running: ls /", "rawInput": {"command": "ls /", "cwd": "/", "dir": "s /"}}, "Running: ls /\ncwd: /\ndir: s /"),
    ({}, "use a tool"),
]


@pytest.mark.parametrize("call, shown", QUESTIONS)
def test_a_question_shows_all_that_is_asked(call, shown):
    assert program.Answer().describe(call) == f"❓ Kiro wants to: {shown}"


def test_what_a_question_does_not_say_is_as_it_was_said_before():
    answer, call = program.Answer(), {"title": "Running: rm", "kind": "execute", "rawInput": {"flags": "-rf /"}}
    answer.hear("session/update", {"update": {"sessionUpdate": "tool_call", "toolCallId": "t", **call}})
    shown = answer.describe({"toolCallId": "t", "title": None, "kind": None, "rawInput": None, "content": None})
    assert shown == "❓ Kiro wants to: Running: rm\nflags: -rf /"


def test_what_a_question_leaves_out_is_counted():
    shown = program.Answer().describe({"title": "w", "rawInput": {f"text{n}": "x" * 5000 for n in range(10)}})
    assert shown.count("\n⚠️ 2007 more characters are not shown.") == 6 and shown.endswith("more characters are not shown.")
    diff = {"type": "diff", "path": "big", "oldText": "a\n" * 500_000, "newText": "a\n" * 250_000 + "b\n" * 250_000}
    assert "+ b" in program.Answer().describe({"content": [diff]})


def test_an_answer_takes_in_what_kiro_says():
    answer = program.Answer()

    def hear(update, method="session/update", **fields):
        answer.hear(method, {"update": {"sessionUpdate": update, **fields}})

    def say(text):
        hear("agent_message_chunk", content={"type": "text", "text": text})

    hear("agent_thought_chunk", content={"type": "text", "text": "hm"})
    assert not answer.heard and answer.text() == ""
    say("one ")
    say("two")
    hear("tool_call", toolCallId="a", title="Reading", kind="read")
    assert answer.running == "Reading" and answer.text() == "one two"
    say("three")
    assert answer.running == "" and answer.text() == "one two\n\nthree"  # what was said after it shows that it has ended
    hear("tool_call", toolCallId="b", title="Testing")
    hear("tool_call_update", toolCallId="a", status="completed")
    assert answer.running == "Testing"
    hear("tool_call_update", toolCallId="b", status="failed",
         content=[{"type": "content", "content": {"type": "text", "text": "1 failed"}}])
    assert answer.running == ""
    say("wrong")
    hear("stream_discarded", "_kiro.dev/session/update")
    assert answer.text() == "one two\n\nthree" and not answer.has_ended
    hear("turn_end")
    assert answer.has_ended
    parts = answer.parts(program.Outcome("⏹ Stopped.", stopped=True), "note", 0)
    assert [part["text"] for part in parts] == ["note", "one two\n\nthree"] and parts[1]["end"] == "⏹ Stopped."


def test_messages_of_an_agent_are_set_apart():
    answer = program.Answer()
    for number, text in ((1, "one"), (1, " more"), (2, "two"), (None, " too")):
        answer.hear("session/update", {"update": {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text},
                                                  **({"messageId": number} if number else {})}})
    assert answer.text() == "one more\n\ntwo too"


def test_a_question_shows_what_the_call_said_before_too():
    answer = program.Answer()
    block = {"type": "content", "content": {"type": "text", "text": "echo begun; sleep 61"}}
    answer.hear("session/update", {"update": {"sessionUpdate": "tool_call", "toolCallId": "t", "title": "Shell",
                                              "content": [block]}})
    shortened = {"type": "content", "content": {"type": "text", "text": "approval to run: echo beg…"}}
    shown = answer.describe({"toolCallId": "t", "content": [shortened, block]})
    assert shown == "❓ Kiro wants to: Shell\napproval to run: echo beg…\necho begun; sleep 61"


def test_titles_have_nothing_of_ours():
    assert program.title_of(f"look at the footer {program.LESSON}") == "look at the footer"


def test_lists_in_a_form_are_written_with_commas():
    field = {"type": "array", "items": {"anyOf": [{"const": "s", "title": "Small"}, {"const": "l", "title": "Large"}]}}
    assert program._wanted(field) == "one or more of Small, Large, with commas between"
    assert program._value(field, "large, Small") == ["l", "s"] and program._value(field, "large, huge") is None
    assert not program._wanted({"type": "array", "items": {"type": "object"}})


def test_an_answer_that_is_nothing_but_a_tool_call_says_what_that_said():
    answer = program.Answer()
    for status in (None, "failed"):
        answer.hear("session/update", {"update": {"sessionUpdate": "tool_call_update", "toolCallId": "t", "title": "Compacting",
                    "status": status, "content": [{"content": {"text": "nothing to compact"}}]}})
    assert answer.parts(program.Outcome(), "", 0) == [program.plain_part("Compacting: failed\nnothing to compact")]
    before = len(answer._tools)
    for n in range(1000):
        answer.hear("session/update", {"update": {"sessionUpdate": "tool_call", "toolCallId": str(n), "title": "t"}})
    assert before == 0 and len(answer._tools) <= program.TOOLS_KEPT


ONLY_NO = "k.PlayedTurn.options = lambda self: [dict(optionId='n', name='No', kind='reject_once')]"
NO_AND_ALWAYS = ("k.PlayedTurn.options = lambda self: [dict(optionId='n', name='No', kind='reject_once'), "
                 "dict(optionId=3, name='Ok', kind='allow_always')]")


@pytest.mark.parametrize("code, kind", [("pass", "allow_once"), (NO_AND_ALWAYS, "allow_always"), (ONLY_NO, "cancelled")],
                         ids=["usual", "no and always", "only no"])
@bot_with(TOOL_APPROVAL="allow")
@ahead
def test_allow_mode_allows_by_kind(telegram, bot, code, kind):
    bot.restart(KIRO_COMMAND=patched_kiro(bot.control, code))
    bot.habits(permission_ids="hyphens")
    telegram.write("!ask Running: make", thread=7)
    telegram.answer(f"permission: {kind}", thread=7)
    assert len(telegram.texts()) == 1


# ---------------------------------------------------------------------------------------------------------
# The tests: odd moments
# ---------------------------------------------------------------------------------------------------------


def test_allow_after_stop_is_too_late(telegram, bot):
    telegram.write("!ask Running: rm", thread=7)
    asked = telegram.answer("❓", thread=7)
    with telegram.batch_of_updates():
        telegram.stop(telegram.drafts(7)[-1])
        telegram.press(asked, 0)
    telegram.answer("Stopped", thread=7)
    assert bot.wire("in", when=lambda entry: "cancelled" in str(entry["frame"].get("result")))
    assert not bot.wire("in", when=lambda entry: "selected" in str(entry["frame"].get("result")))


def test_an_answer_of_nothing_but_spaces_is_said_to_be_none(telegram, bot):
    for thread, blank in ((7, "   "), (8, " \\n \\n"), (9, "\t")):
        telegram.write(f"!say {blank}", thread=thread)
        telegram.answer("without saying anything", thread=thread)


def test_an_edit_into_a_command_leaves_the_question_as_it_was(telegram, bot):
    bot.habits(new={"gate": "never"})
    message = telegram.write("an important question", thread=7)
    bot.wait_wire("in", "session/new")
    telegram.edit(message, "/status")
    after = telegram.write("/help", thread=8)
    telegram.wait_until(lambda: telegram.is_acknowledged(after))
    bot.kill()
    bot.habits()
    bot.start()
    telegram.answer("echo: an important question", thread=7)


def test_what_follows_new_goes_to_a_new_session_or_nowhere(telegram, bot):
    ask(telegram, "hello")
    bot.habits(new={"error": -32603, "data": "no way"})
    said = ask(telegram, "/new do this")
    assert "no way" in said and "not sent to Kiro" in said
    bot.habits(new={"gate": "go"})
    telegram.write("/new do that", thread=7)
    bot.wait_wire("in", "session/new", count=3)
    telegram.write("/stop", thread=7)
    assert "not sent to Kiro" in telegram.answer("⏹ Stopped.", thread=7).text
    bot.habits()
    bot.open_gate("go")
    goes_on(telegram, 7)
    assert not [prompt for prompt in bot.prompts() if "do th" in prompt]
    bot.habits(new={"gate": "later"})
    for text in ("/new first", "second"):
        telegram.write(text, thread=7)
    bot.wait_wire("in", "session/new", count=4)
    bot.open_gate("later")
    answer = telegram.answer("second", thread=7)
    assert [re.findall("first|second", prompt) for prompt in bot.prompts() if "second" in prompt] == [["first", "second"]], answer.text


@bot_with(MAX_PROCESSES=1)
def test_a_stopped_start_holds_up_nobody(telegram, bot):
    bot.habits(start={"gate": "never"})
    telegram.write("hello", thread=7)
    bot.wait_agents(1)
    telegram.write("/stop", thread=7)
    telegram.answer("Stopped", thread=7)
    bot.habits()
    telegram.write("again", thread=7)
    telegram.answer("echo: again", thread=7)


def test_new_does_not_wait_for_a_warm_start(telegram, bot):
    bot.habits(load={"gate": "never"})
    ask(telegram, "hello")
    bot.wait_wire("in", "session/load")
    telegram.write("/new", thread=7)
    telegram.answer("✨ A new session has begun.", thread=7)
    goes_on(telegram, 7)


def test_what_is_offered_again_may_be_edited_first(telegram, bot):
    message = telegram.write("!error -32603 no way", thread=7)
    failed = telegram.answer("no way", thread=7)
    bot.wait_log("Turn of 1001/7")
    telegram.edit(message, "a way")
    after = telegram.write("/help", thread=8)
    telegram.wait_until(lambda: telegram.is_acknowledged(after))
    telegram.press(failed, "Ask again")
    telegram.answer("echo: a way", thread=7)
    assert not times_said(telegram, "came too late")


@ahead
def test_a_new_session_that_could_not_be_told_is_not_made_again(telegram, bot):
    bot.change("bot.Topic.say.__defaults__ = (), False, 0.5").restart()
    telegram.write("/new", thread=7)
    telegram.answer("new session", thread=7)
    telegram.fault("sendMessage", status=429, retry_after=30)
    telegram.write("/new", thread=7)
    bot.wait_log("What became of /new")
    bot.restart()
    assert len(bot.wire("in", "session/new")) == 2
    assert {row["state"] for row in bot.database("SELECT state FROM inbox")} == {"done"}


def test_what_follows_new_goes_once_whatever_ends_the_bot_and_with_what_it_replies_to(telegram, bot):
    quoted = telegram.write("the quoted words", thread=7)
    telegram.answer("the quoted words", thread=7)
    settle(bot)
    unsaid = telegram.fault("sendMessage", status=500, times=None)
    telegram.write("/new do this", thread=7, reply_to=quoted)
    telegram.wait_for("sendMessage", ok=False, containing="A new session", thread=7)
    bot.kill()
    unsaid.end()
    bot.start()
    telegram.answer("do this", thread=7)
    settle(bot)
    [prompt] = [prompt for prompt in bot.prompts() if "do this" in prompt]
    assert prompt.count("do this") == 1 and "the quoted words" in prompt


# ---------------------------------------------------------------------------------------------------------
# The tests: the first five minutes
# ---------------------------------------------------------------------------------------------------------


def readme():
    return (REPO / "README.md").read_text()


def test_the_start_says_in_one_line_each_what_was_found(telegram, make_bot):
    telegram.topics_enabled = False
    bot = make_bot().start()
    for what in ("Kiro: ", "Bot: @", "topics are off (switch them on", "Allowed: 1001, 1002",
                 f"Folder: {bot.folder}/workspaces", "tg-acp.db, 0 sessions"):
        assert what in bot.log()
    lines = bot.log().count("\n")
    telegram.write("hello")
    telegram.answer("echo: hello")
    bot.wait_log("Turn of 1001/0: ")
    assert bot.log().count("\n") == lines + 1


def test_in_the_journal_lines_have_no_time_of_their_own(make_bot):
    bot = make_bot()
    log = bot.log_path.stat()
    for stream, pattern in ((f"{log.st_dev}:{log.st_ino}", r"INFO Kiro: "), ("1:2", r"\d{4}-\d\d-\d\d .* INFO Kiro: ")):
        bot.environment = lambda usual=RunningBot.environment, stream=stream: {**usual(bot), "JOURNAL_STREAM": stream}
        bot.log_path.write_text("")
        bot.start()
        assert re.search(f"^{pattern}", bot.log(), re.M)
        bot.stop()


def test_a_check_finds_everything_in_order(telegram, make_bot):
    bot = make_bot()
    result = bot.run("--check")
    assert result.returncode == 0, result.stdout
    assert "FAIL" not in result.stdout and "made a session; models: auto, " in result.stdout
    assert not (bot.folder / "tg-acp.db").exists()


TROUBLES = [
    (dict(KIRO_COMMAND="no-such-kiro acp"), "FAIL  Kiro: KIRO_COMMAND: no-such-kiro is not found"),
    (dict(KIRO_COMMAND="sh -c 'echo error: You are not logged in >&2; exit 1'"), "kiro-cli login --use-device-flow"),
    (dict(KIRO_COMMAND=r"""sed -u 's/.*"id": \([0-9]*\).*/{"id": \1, "result": null}/'"""),
     "FAIL  Handshake: Kiro reports a problem.\n"),
    (dict(TELEGRAM_API_URL="http://127.0.0.1:9"), "FAIL  Bot: Telegram can't be reached"),
    (dict(BOT_TOKEN="123456:another-token"), "FAIL  Bot: BOT_TOKEN is not accepted"),
]


def test_a_check_says_what_is_wrong(make_bot):
    bots = [make_bot(str(number)).hurry(REPLACED_SECONDS=0) for number in range(len(TROUBLES))]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda bot, case: bot.run("--check", **case[0]), bots, TROUBLES)
    for result, (_, told) in zip(results, TROUBLES):
        assert result.returncode == 1
        assert told in result.stdout and "Traceback" not in result.stderr


def test_the_console_takes_each_line_of_a_pipe_as_a_message(make_bot):
    bot = make_bot(BOT_TOKEN=None)
    lines = ["hello", "/status", "/model", "/model auto", "!ask Do it", "1", "!file a.txt hi",
             '!say see <send_file path="a.txt">this</send_file>', "/new", "last"]
    result = bot.run("--console", input="\n".join(lines) + "\n")
    assert result.returncode == 0, result.stderr
    expected = ["echo: hello", "Session: ", "  claude-", "Model for this topic: auto, from", "1. Yes",
                "permission: allow_once", "a.txt] this", "new session", "echo: last"]
    places = [result.stdout.index(what) for what in expected]
    assert places == sorted(places)
    assert "<send_file" not in result.stdout
    assert bot.database("SELECT user_id, thread_id FROM sessions") == [{"user_id": 0, "thread_id": 0}]


@bot_with(QUICK)
@ahead
def test_the_console_leaves_a_running_bot_alone(telegram, bot):
    telegram.write("!say working\n!wait go", thread=7)
    telegram.wait_for("sendMessageDraft", containing="working", thread=7)
    said = bot.run("--console", input="from the console\n!ask Leave the console\n").stdout  # in the midst of a turn
    assert "echo: from the console" in said and "Leave the console" in said
    bot.open_gate("go")
    telegram.answer("working", thread=7)
    bot.restart()
    assert ask(telegram, "still there?") == "echo: still there?"
    assert not telegram.find(containing="console") and not bot.database("SELECT * FROM inbox WHERE user_id = 0")


@ahead
def test_ctrl_c_stops_a_turn_of_the_console(telegram, bot):
    bot.stop()
    bot.set(BOT_TOKEN=None)
    with subprocess.Popen(bot.command("--console"), cwd=bot.folder, env=bot.environment(), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as console:
        console.stdin.write("!say so far\n")
        console.stdin.flush()
        bot.wait_prompt("so far")
        console.stdin.write("!silence\nnext\n")
        console.stdin.flush()
        bot.wait_prompt("!silence")
        console.send_signal(signal.SIGINT)
        bot.wait_prompt("next")
        out, _ = console.communicate(timeout=20)
    assert console.returncode == 0
    assert "so far" in out and "Stopped" in out and "echo: next" in out


def at_console(bot, **environment):
    """A person at the console, with the terminal of a visitor."""
    environment = {**bot.environment(), "TERM": "xterm", **environment}
    command = [sys.executable, "-c", f"import bot; {bot.statements}\nbot.start(['--console'])"]
    return Typist(command, cwd=bot.folder, env=environment)


@ahead
def test_the_console_is_a_place_to_try_it_all(telegram, bot):
    bot.stop()
    bot.set(BOT_TOKEN=None, KIRO_COMMAND="python test_sessions.py")
    (bot.folder / "test_sessions.py").symlink_to(REPO / "test_sessions.py")
    with at_console(bot, KIRO_STAND_IN="") as person:
        assert "Ctrl-D leaves" in person.type("")
        person.type("helo\x1b[Dl\r", "You wrote: **hello**")  # an arrow key
        person.type("")
        assert re.findall("- `([a-z]+)`: ", person.type("help\r")) == ["ask", "table", "file", "slow"]
        person.type("ask\r", "Choose 1-3: ")
        assert "Stopped" not in person.type("yes\r", "Choose 1-3: ")
        assert "→ Yes" in person.type("1\r", "That was your decision.")
        assert "| dog | 4 |" in person.type("table\r", "print(4 + 2)")
        person.type("", "> ")
        assert "animals.txt] Animals" in person.type("file\r")
        person.type("slow\r", "002")
        assert "⏹ Stopped." in person.type("\x03")
        assert person.type("/help\r").count("/status ") == 1
        assert "\n  claude-" in person.type("/model\r")
        assert "Nothing is running" in person.type("/stop\r")
        assert "Session: " in person.type("/status\r")
        back, = re.findall(r"Back to the former session +(/sessions [0-9a-f]{16})", person.type("/new\r"))
        assert "Going on with" in person.type(back + "\r")
        person.type("\x1b[200~two\nlines\x1b[201~\r", "You wrote: **two\r\nlines**")  # pasted
        person.type("", "> ")
        assert "two" in person.type("\x1b[A" * 4 + "\r", "Session: ")  # the history: /status again
        person.type("exit\r", "\n")
        assert person.process.wait(10) == 0


def test_a_console_without_kiro_says_so_before_the_first_prompt(make_bot):
    bot = make_bot(BOT_TOKEN=None, KIRO_COMMAND="no-such-kiro acp").hurry(REPLACED_SECONDS=0)
    with at_console(bot) as person:
        greeting = person.type("")
        assert greeting.count("no-such-kiro is not found") == 1 and "KIRO_COMMAND='python test_sessions.py'" in greeting
        answer = person.type("hello\r")
        assert answer.count("no-such-kiro") == 1 and "WARNING" not in answer and "ERROR" not in answer
        person.type("\x04", "\n")
        assert person.process.wait(10) == 0


def test_python_in_the_command_is_this_one_where_there_is_no_other(monkeypatch):
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert read_settings({"KIRO_COMMAND": "python x"}).kiro_command == [sys.executable, "x"]


def test_without_the_requirements_it_says_how_to_install_them(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    result = subprocess.run([tmp_path / "bare/bin/python", REPO / "bot.py"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "is not installed" in result.stderr and "pip install -q -r requirements.txt" in result.stderr


@ahead
def test_the_server_tells_a_topic_something(telegram, bot):
    telegram.open_topic(7)
    assert "\nTopic: 1001/7\n" in ask(telegram, "/status")
    told = bot.run("--tell", "1001/7", "CI", "failed", BOT_TOKEN=None)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    telegram.write("now poll", thread=8)  # the next round of the poll
    shown = telegram.answer("⏰ From the server: CI failed", thread=7)
    assert shown.params["disable_notification"] is True
    answer = telegram.answer("echo: [From the server, not from the user:]\nCI failed", thread=7)
    assert not answer.params.get("disable_notification")
    telegram.write(elicit("Name?", {"name": {"type": "string"}}) + "!say asked", thread=7)
    asked = question(telegram, "Name?")
    bot.run("--tell", "1001/7", "no answer to it")
    telegram.write("poll again", thread=8)
    telegram.answer("⏰ From the server: no answer to it", thread=7)
    telegram.write("Ann", thread=7)
    settled(telegram, asked, "→ Ann")
    telegram.answer("echo: [From the server, not from the user:]\nno answer to it", thread=7)
    bot.stop()
    with ThreadPoolExecutor() as pool:
        told = pool.map(lambda how: bot.run("--tell", *how[0], input=how[1]),
                        ((["1001/7"], "/new"), (["1001/0", "root"], "")))
    assert [done.returncode for done in told] == [0, 0]
    bot.run("--tell", "1002/9", "bob's")
    bot.start(BOT_TOKEN=TOKEN, ALLOWED_TELEGRAM_IDS=str(ALICE["id"]))
    telegram.answer("echo: [From the server, not from the user:]\n/new", thread=7)
    telegram.answer("root", thread=None)
    wait_until(lambda: states(bot)[-3:] == ["done", "done", "waiting"], what="the end of all turns but Bob's")
    assert not telegram.texts(user=BOB)


@bot_with(dict(TOLD_AT_MOST=4))
def test_what_the_server_may_not_tell_is_one_line(bot):
    bot.stop()
    refused = [(["1001/7"], " \n", "1 to 100000 bytes"), (["1001/7", ""], "x", "1 to 100000 bytes"),
               (["1001/7"], "é" * 60_000, "1 to 100000 bytes"), (["6666/7", "x"], "", "of an allowed user"),
               (["1001", "x"], "", "USER/THREAD"), (["1001/7/8", "x"], "", "USER/THREAD"), (["١/٧", "x"], "", "USER/THREAD")]
    taken = [["1001/7", "again"]] * 4 + [["1001/8", "elsewhere"]]
    with ThreadPoolExecutor(4) as pool:
        refusals = pool.map(lambda case: bot.run("--tell", *case[0], input=case[1]), refused)
        others = pool.map(lambda arguments: bot.run("--tell", *arguments), taken)
    for done, (_, _, said) in zip(refusals, refused):
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert [done.returncode for done in others] == [0] * len(taken)
    with ThreadPoolExecutor() as pool:
        done, elsewhere = pool.map(lambda thread: bot.run("--tell", f"1001/{thread}", "one more"), (7, 8))
    assert done.returncode == 1 and "4 messages wait" in done.stderr and elsewhere.returncode == 0
    (bot.folder / "tg-acp.db").unlink()
    done = bot.run("--tell", "1001/7", "x")
    assert done.returncode == 2 and "run it in the bot's folder" in done.stderr


def test_the_help_describes_the_modes(make_bot):
    result = make_bot().run("--help")
    assert result.returncode == 0
    assert "--check" in result.stdout and "--console" in result.stdout and "conversation code" not in result.stderr


def test_the_example_settings_work_once_two_values_are_filled_in(telegram, make_bot):
    bot = make_bot().hurry(REPLACED_SECONDS=0)
    example = (REPO / ".env.example").read_text()
    for name in ("BOT_TOKEN", "ALLOWED_TELEGRAM_IDS"):
        example = example.replace(f"\n{name}=\n", f"\n{name}={bot.settings[name]}\n")
    example = example.replace("https://api.telegram.org", telegram.url)
    (bot.folder / ".env").write_text(example)
    bot.set = lambda **settings: None
    bot.start()
    telegram.write("hello")
    telegram.answer("kiro-cli")


def test_the_readme_and_the_example_name_each_setting_with_its_default():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]*?)`? \|", readme(), re.M))
    example = dict(re.findall(r"^([A-Z_]+)=(.*)$", (REPO / ".env.example").read_text(), re.M))
    assert set(rows) == set(example)
    assert {name: value for name, value in rows.items() if example[name]} == {n: v for n, v in example.items() if v}


def test_the_ci_runs_the_readmes_test_command():
    command, = re.findall(r"^(python3 -m venv .*pytest.*)$", readme(), re.M)
    assert command in (REPO / ".ci/run").read_text()


def test_the_bot_that_was_thrown_out_has_stayed_out_for_longer_than_a_poll(thrown_out):
    """Here, so that some time has passed."""
    bot, telegram = thrown_out
    assert bot.running()
    telegram.wait_for("getUpdates", ok=None, count=2)
    stray, second, *later = telegram.find("getUpdates", ok=None)
    assert 1 <= second.time - stray.time < 5
    if time.monotonic() - second.time < 35:
        assert not later
    else:
        telegram.answer("after the other bot", thread=7)
        assert later[0].time - second.time >= 35
