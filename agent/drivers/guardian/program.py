"""Keep the guard's program in memory, as it was installed when this process started.

A program that was replaced on disk since then may use other messages.
"""

import fcntl
import json
import marshal
import os
import sys
from importlib.abc import SourceLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType

MODULES = (
    "agent.proctree",
    "agent.guard",
    "agent.guard.processes",
    "agent.guard.log",
    "agent.guard.hook",
    "agent.guard.main",
)
"""All modules of the guard, each after those that it imports; ``main`` is last. They are only read here:
imported, they would cost the agent half a MiB."""

BOOTSTRAP = """\
# failover-agent guard
import marshal, os, sys
if sys.implementation.cache_tag != {tag!r}:
    sys.exit("guard not started: Python was replaced, and is not {tag} any more; restart the agent")
program = int(sys.argv[3])
sys.modules["agent"] = type(sys)("agent")
for name, code in marshal.loads(os.pread(program, os.fstat(program).st_size, 0)):
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
del code
sys.exit(module.main())
"""
"""The bootstrap of the guard's program. It cannot import our modules, as Python runs with -I -S. The agent has
compiled them with the same version of Python, which saves the guard 2 MiB."""

RELEASE_HELPER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from agent.daemon.release_helper import main;"
    " sys.exit(main(sys.argv[2:]))"
)
"""The helper by which the guard releases the role; the guard adds epoch and time limit."""


def bootstrap() -> str:
    """Source of the command that runs ``program``."""
    return BOOTSTRAP.format(tag=sys.implementation.cache_tag)


def program() -> bytes:
    """Name and code of every module of the guard, as installed now.

    Raises:
        OSError: a source cannot be read.
    """
    return marshal.dumps([(name, _code(name)) for name in MODULES])


def _code(name: str) -> CodeType:
    spec = find_spec(name)
    if spec is None:
        raise FileNotFoundError(f"the module {name} is not installed any more")
    assert isinstance(spec.loader, SourceLoader)  # noqa: S101 - nothing else is installed
    code = spec.loader.get_code(name)
    assert code is not None  # noqa: S101 - likewise
    return code


def sealed_memory(data: bytes) -> int:
    """Return the descriptor of a file in memory with ``data``, sealed so that nobody can change it."""
    descriptor = os.memfd_create("guard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def helper_command() -> tuple[str, ...]:
    """The command that releases the role. Its paths are absolute, as the guard's directory is /."""
    paths = json.dumps([str(Path(path).absolute()) for path in sys.path])
    return sys.executable, "-P", "-c", RELEASE_HELPER, paths
