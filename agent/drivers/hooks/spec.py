"""The configured hooks: form, steps and context of each.

Owns the meaning of the hook settings, and their check before anything runs. Starts nothing.
"""

import grp
import hashlib
import os
import pwd
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from agent.drivers.hooks.check import HookCheck, RunAs, scripts_in
from agent.drivers.hooks.process import HookContext
from agent.errors import ConfigError, ExitCode
from agent.schema.formats import is_http
from agent.schema.secret_files import read_secret
from agent.schema.settings import AgentSettings

PROMOTIONS = ("pending_primary", "primary")
ROLE_EVENTS = (*PROMOTIONS, "secondary")
NOTIFICATIONS = ("joined", "lost", "left")
EVENTS = (*ROLE_EVENTS, *NOTIFICATIONS)
"""Every event that can have a hook; its setting is ``hook_`` and this name."""


class Form(StrEnum):
    """Form of a hook."""

    COMMAND = "command"
    DIRECTORY = "directory"
    WEBHOOK = "webhook"


@dataclass(frozen=True, slots=True)
class CommandStep:
    """A step that is a process. ``name`` is the script's, None for a single command."""

    argv: tuple[str, ...]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class WebhookStep:
    """A step that is an HTTP request."""

    url: str
    name: str | None = None


Step = CommandStep | WebhookStep


def shown(hook: Sequence[str]) -> tuple[str, ...]:
    """The words of a hook for a log, or a file that others read: a query, which may be a secret, becomes a digest."""
    url, mark, query = "".join(hook[:1]).partition("?")
    if not mark or not is_http(url):
        return tuple(hook)
    return (f"{url}?sha256:{hashlib.sha256(query.encode()).hexdigest()[:4]}",)


@dataclass(frozen=True, slots=True)
class HookSpec:
    """The hook of one event. ``load_specs`` makes them.

    Attributes:
        name: the event.
        value: as configured: program and arguments, or one directory, or one URL.
        retries: how often a failed step is tried again.
        all_steps: a failed step does not prevent the next ones.
        secret: signs webhooks.
        tls: verifies https servers; None without a webhook.
        writable_directories: see ``HookCheck``.
        scripts: scripts of a directory that belong to each run, even if they are not there any more.
    """

    name: str
    value: tuple[str, ...]
    retries: int = 0
    all_steps: bool = False
    context: HookContext = field(default_factory=HookContext)
    secret: bytes | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    writable_directories: bool = False
    scripts: tuple[CommandStep, ...] = ()

    @property
    def form(self) -> Form:
        """The form of the hook; a path is looked up in the file system each time."""
        if is_http(self.value[0]):
            return Form.WEBHOOK
        if self.scripts or (len(self.value) == 1 and os.path.isdir(self.value[0])):  # noqa: PTH112 - never raises
            return Form.DIRECTORY
        return Form.COMMAND

    def steps(self) -> tuple[Step, ...]:
        """The steps in order, at least one. A directory is read anew.

        Raises:
            ConfigError: HOOK_MISSING, it cannot be read or has no script.
        """
        match self.form:
            case Form.WEBHOOK:
                return (WebhookStep(self.value[0]),)
            case Form.COMMAND:
                return (CommandStep(self.value),)
            case Form.DIRECTORY:
                return self._scripts()

    def ignored(self) -> tuple[tuple[str, str], ...]:
        """Files of the directory that are not run: (name, reason)."""
        if self.form is not Form.DIRECTORY:
            return ()
        try:
            return scripts_in(Path(self.value[0]))[1]
        except OSError:
            return ()  # check() reports it

    def check(self) -> None:
        """Reject a hook that could not run, or that others could change (R11). Calls no webhook.

        Raises:
            ConfigError: see ``HookCheck``.
        """
        if (form := self.form) is Form.COMMAND:
            self._checker.check_command(self.value)
        elif form is Form.DIRECTORY:
            self._checker.check_directory(Path(self.value[0]))
            for step in self.scripts:
                self.recheck(step)

    def with_scripts(self) -> "HookSpec":
        """Check this hook; return it with the scripts that its directory has at the first call. Raises ConfigError."""
        self.check()
        if self.scripts or self.form is not Form.DIRECTORY:
            return self
        return replace(self, scripts=self._scripts())

    def recheck(self, step: CommandStep) -> None:
        """Check a script again before its start: it may have changed. Raises ConfigError."""
        if step.name is not None:
            self._checker.check_command(step.argv)

    @property
    def _checker(self) -> HookCheck:
        context = self.context
        _check_directory(context.directory)
        return HookCheck(self.name, context.run_as, context.search_path, self.writable_directories)

    def _scripts(self) -> tuple[CommandStep, ...]:
        directory = Path(self.value[0])
        try:
            scripts, _ = scripts_in(directory)
            reason = "it has no script"
        except OSError as error:
            scripts, reason = (), str(error.strerror)
        steps = {CommandStep((str(script),), script.name) for script in scripts}.union(self.scripts)
        if not steps:
            raise ConfigError(
                f"hook {self.name}: {directory} cannot be run: {reason}",
                exit_code=ExitCode.HOOK_MISSING,
            )
        return tuple(sorted(steps, key=lambda step: os.fsencode(step.argv[0])))


def load_specs(settings: AgentSettings) -> Mapping[str, HookSpec]:
    """Load the configured hooks, by event. Call ``HookSpec.check`` before any of them runs.

    Raises:
        ConfigError: an unknown user or group, no permission to switch to it, no such directory, or a
            secret or certificates that cannot be read.
    """
    values = {e: tuple(value) for e in EVENTS if (value := getattr(settings, f"hook_{e}"))}
    if not values:
        return MappingProxyType({})
    context = HookContext(
        _check_directory(str(settings.hook_directory)),
        run_as(settings.hook_user, settings.hook_group),
        MappingProxyType(dict(settings.hook_environment)),
    )
    secret_file = settings.webhook_secret_file
    secret = read_secret(secret_file).encode() if secret_file is not None else None
    urls = [value[0] for value in values.values() if is_http(value[0])]
    tls = _tls(settings.webhook_ca_file, urls)
    return MappingProxyType(
        {
            event: HookSpec(
                event,
                value,
                retries=settings.hook_retries if event in PROMOTIONS else 0,
                all_steps=event not in PROMOTIONS,
                context=context,
                secret=secret,
                tls=tls,
                writable_directories=settings.hook_directories_writable,
            )
            for event, value in values.items()
        }
    )


def _check_directory(directory: str) -> str:
    """Return the working directory if a hook can be started in it now. Raises ConfigError."""
    if not os.access(f"{directory}/.", os.X_OK, effective_ids=True):
        raise ConfigError(f"hook_directory {directory} must be a directory that can be entered")
    return directory


def run_as(user: str | None, group: str | None) -> RunAs | None:
    """The user and group of hooks, or None for the agent's own.

    Raises:
        ConfigError: there is no such user or group, or the agent is not root.
    """
    if user is None and group is None:
        return None
    entry = _user(user) if user is not None else None
    uid = entry.pw_uid if entry else int(user) if user is not None else os.geteuid()
    if group is not None:
        gid = _group(group)
    elif entry is not None:
        gid = entry.pw_gid
    else:
        raise ConfigError(f"hook_user {user} has no entry with its group: set hook_group too")
    if os.geteuid() != 0:
        raise ConfigError(
            f"hook_user and hook_group need an agent that runs as root, and this is uid"
            f" {os.geteuid()}: leave them out, or run it as root"
        )
    groups = tuple(os.getgrouplist(entry.pw_name, gid)) if entry else (gid,)
    return RunAs(uid, gid, groups, home=entry.pw_dir if entry else None)


def _user(name: str) -> pwd.struct_passwd | None:
    """The entry of a user; None for a user id without one."""
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        if name.isdecimal() and int(name) < 2**32 - 1:
            return None
        raise ConfigError(f"hook_user {name}: there is no such user on this host") from None


def _group(name: str) -> int:
    if name.isdecimal() and int(name) < 2**32 - 1:
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"hook_group {name}: there is no such group on this host") from None


def _tls(ca_file: Path | None, urls: list[str]) -> ssl.SSLContext | None:
    """The TLS context for webhooks, with the file's or the system's certificates."""
    if not urls:
        return None
    # Now, and not when it is called: the program may be replaced on disk meanwhile.
    import agent.drivers.hooks.webhook  # noqa: F401, PLC0415 - takes 0.1 s, and few need it

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca_file is not None:
            context.load_verify_locations(ca_file)
        elif any(url.startswith("https://") for url in urls):
            context.load_default_certs()
    except OSError as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"webhook_ca_file {ca_file} must have certificates in PEM: {error}"
        ) from None
    return context
