"""What every entry point shares: flags, overrides, and how mistakes and stops end a process.

Exit codes: 0 done, or stopped on request; 2 a user's mistake (a message, no traceback); 1 anything
else.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags, logging

from karploop.config import Config
from karploop.endpoints.calls import Endpoint, read_extra
from karploop.errors import RunFailed, UserError
from karploop.resolve import resolve

_PREFIX = "--config."
_ARGUMENTS = tuple(sys.argv[1:])  # as typed, before overrides are taken out


class StopRequest:
    """Set by SIGTERM or Ctrl-C; the loop looks at it between chunks. A second Ctrl-C kills."""

    def __init__(self):
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after the current chunk …", file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses flags, calls `main` with what is left of argv, and exits with the right code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)
    code = 1
    try:
        wants_help = {"--help", "-h"} & {*sys.argv[1:]}
        code = _print_help() if wants_help else main(flags.FLAGS(sys.argv)) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
    except flags.Error as error:
        print(f"error: {error}\nRun with --help for the flags.", file=sys.stderr)
        code = 2
    except Exception as error:
        if is_disk_full(error):
            print(
                "error: the disk is full. Nothing committed is lost: free some space (see "
                "`python -m experiments.gc`), then run the same command again",
                file=sys.stderr,
            )
        elif _in_cluster() and _is_of_a_lost_process(error):
            print(
                f"error: another process of this run has ended or cannot be reached ({error}). "
                "What is committed stays: start the same command on all machines again, and it "
                "goes on from there",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
    if code and _in_cluster():
        # Threads of this process may wait for the other processes, and those wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_help() -> int:
    """What the program's first lines say, and its flags."""
    print(sys.modules["__main__"].__doc__)
    print(flags.FLAGS.main_module_help())
    if shared := flags.FLAGS.get_flags_for_module(__name__):
        print("\n".join(f"  --{flag.name}: {flag.help} (default: {flag.value})" for flag in shared))
    return 0


def no_arguments(argv: list[str]) -> None:
    """Raises UserError where the command line holds more than flags."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': see --help for the flags")


def _in_cluster() -> bool:
    """Whether this is one of several processes of a run (`launch.join_cluster`)."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _is_of_a_lost_process(error: Exception) -> bool:
    """Whether the runtime waited in vain for another process; it has no class for that."""
    signs = ("gloo", "connection closed", "connection reset", "heartbeat", "coordination service")
    of_runtime = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return of_runtime and any(sign in str(error).lower() for sign in signs)


def define_endpoint_flags() -> None:
    """The flags of a tool that asks a model on the mesh, or one behind an address."""
    flags.DEFINE_string("base_url", None, "Address of an OpenAI-compatible server: http://…/v1.")
    flags.DEFINE_string("key_env", "OPENAI_API_KEY", "Environment variable that holds its key.")
    flags.DEFINE_integer("concurrency", 16, "Calls to it at a time.")
    flags.DEFINE_integer("requests_per_minute", 0, "0: no limit.")
    flags.DEFINE_integer("tokens_per_minute", 0, "Prompts and replies together; 0: no limit.")
    flags.DEFINE_float("timeout", 120.0, "Seconds from a call to its whole reply.")
    flags.DEFINE_integer("attempts", 8, "Of a call, before it counts as failed.")
    flags.DEFINE_float("input_price", 0.0, "Dollars a million tokens of prompts.")
    flags.DEFINE_float("output_price", 0.0, "Dollars a million tokens of replies.")
    flags.DEFINE_float("cap", 0.0, "Most dollars that the job may cost; 0: no cap.")
    flags.DEFINE_string("extra", "{}", "JSON object laid over every request; null removes a key.")


def endpoint() -> Endpoint:
    """The endpoint that those flags, and `--model`, describe."""
    extra = read_extra(flags.FLAGS.extra, "--extra")
    names = set(Endpoint.__dataclass_fields__) - {"extra"}
    return Endpoint(**{name: getattr(flags.FLAGS, name) for name in names}, extra=extra)


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=v` (or `--config.a.b v`, or `--config.a.b` for true) out of argv."""
    rest, overrides = [], {}
    arguments = iter(range(len(argv)))
    for index in arguments:
        argument = argv[index]
        if argument.startswith("-config."):
            argument = "-" + argument
        if not argument.startswith(_PREFIX):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix(_PREFIX).partition("=")
        if not equals:
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            value = "true" if following.startswith("--") else argv[next(arguments)]
        overrides[name] = value
    return rest, overrides


def load_config(spec: str, overrides: Mapping[str, str]) -> Config:
    """The resolved config of a run; see `load_settings`.

    Raises:
      UserError: also for anything that `resolve` refuses.
    """
    return resolve(load_settings(spec), overrides)


def load_settings(spec: str) -> dict[str, Any]:
    """What `get_config(arg)` of `path/to/file.py[:ARG]` returns.

    Raises:
      UserError: no such file, or no `get_config` in it.
    """
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path):
        raise UserError(
            f"no config file '{path}': --config wants a path such as configs/addition.py"
        )
    module_spec = importlib.util.spec_from_file_location("karploop_user_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"'{path}' defines no get_config(arg): see configs/addition.py for one")
    try:
        settings = module.get_config(argument or None)
    except ValueError as error:
        raise UserError(f"'{path}' refuses the argument '{argument}': {error}") from error
    return settings.to_dict()


def command() -> str:
    """The command line that started this process, to be typed again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module else shlex.quote(sys.argv[0])
    return f"python {program} {shlex.join(_ARGUMENTS)}"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, says that no space is left."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
