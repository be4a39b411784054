"""The registry folder, on a local disk or NFS.

registry.json                          schema
adapters/NAME@vN-hash8/                adapter_config.json, adapter_model.safetensors, manifest.json; read-only, never changed
aliases/NAME.json                      which version is live, and the history (registry/alias.py)

Readers need no lock: an alias changes in one rename, and folders never change. Writers hold `.lock`. A version becomes one by its
entry in the alias file, the last write of a promotion: whatever came before it and was cut off, the next promotion removes.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_ray.config.hints import did_you_mean
from rlhf_ray.errors import DISK_FULL, ArtifactError, ConfigError, ResourceError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.registry.alias import Alias, now, read_alias
from rlhf_ray.registry.candidate import Candidate, identity, read_candidate
from rlhf_ray.registry.entry import FILES, MANIFEST, Entry, open_entry
from rlhf_ray.registry.gates import Gate, base_gate, check_gates, gates_of
from rlhf_ray.registry.manifest import manifest_of
from rlhf_ray.registry.names import adapter_id, check_alias, is_alias, read_spec, read_version
from rlhf_ray.storage.checkpoints import SCHEMA, check_schema
from rlhf_ray.storage.files import atomic_replace_folder, atomic_write_json, describe_files, read_json, sha256_file
from rlhf_ray.storage.lock import locked

ENVIRONMENT = "RLHF_RAY_REGISTRY"
DEFAULT = "registry"
WAIT_S = 120.0
"""How long a writer waits for another one; a promotion takes about as long as copying the adapter."""
Stamp = tuple[int, int, int]
"""Size, time and inode of a name's file."""
_LEFTOVER = re.compile(r"\..+\.(tmp|old)-[0-9a-f]+")
_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Promotion:
    """entry: what is live now.  is_new: a version was made; else these very bytes were there already.
    changed: the alias moved.  previous: id of what was live before."""

    entry: Entry
    gates: tuple[Gate, ...]
    is_new: bool
    changed: bool
    previous: str | None


class Registry:
    """Adapters by name. path: default $RLHF_RAY_REGISTRY, else ./registry; it is made by the first promotion."""

    def __init__(self, path: Path | str | None = None) -> None:
        given = str(path if path is not None else os.environ.get(ENVIRONMENT) or DEFAULT)
        if "://" in given:
            raise ConfigError.at("--registry", "is not a folder", "a local or NFS folder", given)
        self.path = Path(given).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Registry({str(self.path)!r})"

    # ---------------------------------------------------------------- reading

    def names(self) -> list[str]:
        """All names with a live version, sorted. ArtifactError if an alias file is damaged."""
        listed = self._listed()
        return [name for name in listed if read_alias(self._alias_file(name), name).live is not None]

    def alias(self, name: str) -> Alias:
        """Versions and history of `name`. ConfigError if there is no such name, ArtifactError if its file is damaged."""
        self._check_schema()
        if not is_alias(name) or not self._alias_file(name).is_file():
            raise self._unknown(name)
        return read_alias(self._alias_file(name), name)

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every change of `name`, oldest first: {action, version, from, when, by, reason, forced}."""
        return [dict(event) for event in self.alias(name).history]

    def resolve(self, spec: str) -> Entry:
        """The version that `spec` (NAME, NAME@v3 or NAME@v3-hash8) stands for now, every byte of it verified.

        ConfigError if there is no such name or version, ArtifactError if its files are not those that were promoted."""
        wanted = read_spec(spec)
        alias = self.alias(wanted.name)
        version = alias.live if wanted.version is None else wanted.version
        if version is None:
            raise self._unknown(wanted.name)
        recorded = alias.versions.get(version)
        if recorded is None:
            raise ConfigError.at(spec, f"{alias.name} has no version v{version}", _numbers(alias))
        if wanted.hash8 is not None and not recorded["adapter_sha256"].startswith(wanted.hash8):
            raise ConfigError.at(spec, "names an adapter other than the one that is there", recorded["id"], spec)
        return open_entry(self.path / "adapters" / recorded["id"], recorded)

    def poll(self) -> str:
        """A token that changes whenever any name does. Costs one look at the folder, no reading; `RegistryFollower` says what
        has changed."""
        return ";".join(f"{name}:{':'.join(map(str, stamp))}" for name, stamp in sorted(self.stamps().items()))

    def stamps(self) -> dict[str, Stamp]:
        """Of every name's file. An alias file only grows, so that its size tells two changes within one tick of the clock apart."""
        try:
            with os.scandir(self.path / "aliases") as found:
                files = {
                    entry.name.removesuffix(".json"): entry.stat() for entry in found if entry.name.endswith(".json")
                }
        except FileNotFoundError:
            return {}
        return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in files.items() if is_alias(name)}

    def stamp(self, name: str) -> Stamp | None:
        """Of one name's file; None if there is none."""
        try:
            s = os.stat(self._alias_file(name))
        except OSError:
            return None
        return s.st_size, s.st_mtime_ns, s.st_ino

    def listed(self) -> list[str]:
        """Names by their files, which are not looked at: those included of which no promotion has got to its end."""
        try:
            found = os.listdir(self.path / "aliases")
        except FileNotFoundError:
            return []
        return sorted(filter(is_alias, (name.removesuffix(".json") for name in found if name.endswith(".json"))))

    # ---------------------------------------------------------------- writing

    def promote(
        self,
        source: str,
        alias: str,
        *,
        step: int | None = None,
        max_kl: float | None = None,
        min_reward: float | None = None,
        force: bool = False,
        reason: str = "",
        log: Callable[[str], None] = lambda line: None,
    ) -> Promotion:
        """Give the adapter of `source` (RUN, RUN@STEP, SWEEP) the name `alias`, as its next version, and make it live.

        step: of a checkpoint.   max_kl, min_reward: limits of the gates, see registry/gates.py.
        force: go on although gates have failed, all but integrity; `reason` is then needed, and recorded.
        log: gets a line per gate.
        ConfigError for a failed gate, a bad name, a source without an adapter; ArtifactError for what is damaged."""
        check_alias(alias)
        if force and not reason.strip():
            raise ConfigError.at("--force", "needs a reason, which is recorded", '--reason "..."')
        candidate = read_candidate(source, step)
        gates = gates_of(candidate, max_kl, min_reward)
        for gate in gates:
            log(str(gate))
        with self._writing(make=True):
            known = self._alias_to_change(alias)
            live = None if known.live is None else known.versions[known.live]
            _check_kind(alias, candidate, live)
            gates.append(base_gate(candidate, live))
            log(str(gates[-1]))
            forced = check_gates(gates, force)
            version = self._same_version(known, candidate)
            is_new = version is None
            if version is None:
                known, version = self._add(known, candidate, gates, forced, reason)
            changed = is_new or version != known.live
            if changed:
                known.then("promote", version, reason, forced).write(self._alias_file(alias))
            previous = None if live is None else str(live["id"])
            return Promotion(self._entry(known, version), tuple(gates), is_new, changed, previous)

    def rollback(self, name: str, to: str | int | None = None, reason: str = "") -> Entry:
        """Make an earlier version of `name` live: the one that was live before this one, or `to` ("v2", 2). Returns it, verified.

        A version that was taken back is not gone back to, unless it is named.
        ConfigError if there is no such name or version, or nothing to go back to; ArtifactError if the version is damaged."""
        check_alias(name, "adapter")
        wanted = None if to is None else read_version(to)
        self.alias(name)
        with self._writing(make=False):
            alias = self._alias_to_change(name)
            version = alias.before_live() if wanted is None else wanted
            if version is None:
                raise ConfigError.at(
                    name,
                    "nothing was live before this version",
                    _numbers(alias),
                    f"v{alias.live}",
                    f"rlhf-ray rollback {name} --to vN",
                )
            if version not in alias.versions:
                raise ConfigError.at("--to", f"{name} has no version v{version}", _numbers(alias))
            if version == alias.live:
                raise ConfigError.at("--to", f"v{version} is live already", "another version")
            entry = self._entry(alias, version)
            alias.then("rollback", version, reason).write(self._alias_file(name))
            return entry

    # ---------------------------------------------------------------- inside

    def _alias_file(self, name: str) -> Path:
        return self.path / "aliases" / f"{name}.json"

    def _listed(self) -> list[str]:
        self._check_schema()
        return self.listed()

    def _check_schema(self) -> None:
        if not (self.path / "registry.json").is_file():
            raise ConfigError.at(
                "--registry",
                f"no registry at {self.path}",
                "a folder that rlhf-ray promote has made",
                fix=f"--registry DIR, or set {ENVIRONMENT}",
            )
        check_schema(str(self.path / "registry.json"), read_json(self.path / "registry.json"))

    def _unknown(self, name: str) -> ConfigError:
        known = self._listed()
        got, expected = repr(name[:80]), ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        return ConfigError.at(
            "adapter", "no adapter of this name", expected or "a promoted one", got, did_you_mean(name, known)
        )

    def _entry(self, alias: Alias, version: int) -> Entry:
        recorded = alias.versions[version]
        return open_entry(self.path / "adapters" / recorded["id"], recorded)

    @contextmanager
    def _writing(self, make: bool) -> Iterator[None]:
        """Hold the registry for writing; what an interrupted writer left behind is gone."""
        try:
            if make:
                self._make()
            with locked(self.path, WAIT_S, kind="registry"):
                if make and not (self.path / "registry.json").exists():
                    atomic_write_json(self.path / "registry.json", {"schema": SCHEMA, "created": now()})
                self._check_schema()
                self._remove_leftovers()
                yield
        except OSError as error:
            if error.errno in DISK_FULL:
                free = shutil.disk_usage(self.path).free
                raise ResourceError.at(
                    str(self.path), "no room; what was live still is", "room for the adapter", f"{free:,} bytes free"
                ) from error
            where = error.filename or self.path
            raise ConfigError.at("--registry", f"cannot write to {where}: {error.strerror}") from error

    def _make(self) -> None:
        """The folders, unless `path` holds something else."""
        if not (self.path / "registry.json").is_file():
            ours = {"adapters", "aliases", "registry.json"}
            inside = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.is_dir() else []
            if self.path.exists() and (not self.path.is_dir() or {*inside} - ours):
                raise ConfigError.at(
                    "--registry",
                    f"{self.path} is not a registry",
                    "a new or empty folder",
                    ", ".join(sorted(inside)[:5]) or "a file",
                )
        for name in ("adapters", "aliases"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def _remove_leftovers(self) -> None:
        """Remove the temporary files and folders of writes that did not end. Call it as the one writer."""
        for folder in (self.path, self.path / "adapters", self.path / "aliases"):
            for path in folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    _remove(path)

    def _alias_to_change(self, name: str) -> Alias:
        """What is known of `name`, new or not, with folders removed that no promotion has finished.

        ConfigError for a name that differs from another in case only; ArtifactError if adapters have lost their alias file."""
        listed = self._listed()
        twin = next((other for other in listed if other != name and other.casefold() == name.casefold()), None)
        if twin is not None:
            raise ConfigError.at("--alias", f"{name} differs from {twin} in upper and lower case only", "another name")
        folders = [p for p in (self.path / "adapters").iterdir() if p.name.startswith(f"{name}@v")]
        if name not in listed:
            if folders:
                raise ArtifactError.at(
                    str(self._alias_file(name)),
                    "file is missing, though the name has adapters",
                    folders[0].name,
                    fix="put it back from a copy, or choose another name",
                )
            return Alias(name)
        alias = read_alias(self._alias_file(name), name)
        published = {version["id"] for version in alias.versions.values()}
        for folder in folders:
            if folder.name not in published:
                _remove(folder)
        return alias

    def _same_version(self, alias: Alias, candidate: Candidate) -> int | None:
        """The newest version that is this very adapter, and undamaged."""
        for version, recorded in sorted(alias.versions.items(), reverse=True):
            if recorded["adapter_sha256"] == candidate.files.sha256:
                try:
                    entry = self._entry(alias, version)
                    found = identity(entry.sha256, entry.load().config, entry.manifest)
                except ArtifactError:
                    continue
                if found == candidate.identity():
                    return version
        return None

    def _add(
        self, alias: Alias, candidate: Candidate, gates: list[Gate], forced: tuple[str, ...], reason: str
    ) -> tuple[Alias, int]:
        """Write the folder of the next version. It is none until the alias that is returned is written."""
        version = alias.next_version()
        if not alias.versions:
            # A folder without an alias file then means that the file was lost, and never that a promotion was cut off.
            alias.write(self._alias_file(alias.name))
        name = adapter_id(alias.name, version, candidate.files.sha256)
        manifest = manifest_of(candidate, alias.name, version, name, gates, forced, reason)
        target = self.path / "adapters" / name
        temporary = target.with_name(f".{name}.tmp-{uuid.uuid4().hex[:12]}")
        try:
            temporary.mkdir()
            for file in FILES:
                shutil.copyfile(Path(candidate.files.path) / file, temporary / file, follow_symlinks=False)
            copied = read_adapter(temporary)
            if (copied.sha256, copied.config) != (candidate.files.sha256, candidate.files.config):
                raise ArtifactError.at(
                    candidate.files.path, "changed while it was copied", candidate.files.sha256, copied.sha256
                )
            atomic_write_json(temporary / MANIFEST, {**manifest, "files": describe_files(temporary)})
            recorded = {
                "id": name,
                "kind": candidate.kind,
                "adapter_sha256": candidate.files.sha256,
                "manifest_sha256": sha256_file(temporary / MANIFEST),
                "base": {kind: candidate.base[kind] for kind in ("path", "weights_sha256", "config_sha256")},
                "created": manifest["created"],
            }
            for path in (*temporary.iterdir(), temporary):
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_WRITE)
            atomic_replace_folder(temporary, target)
        finally:
            if temporary.exists():
                _remove(temporary)
        return replace(alias, versions={**alias.versions, version: recorded}), version


def _check_kind(alias: str, candidate: Candidate, live: Mapping[str, Any] | None) -> None:
    """Policies answer, reward models score: one name is never both, whatever is forced."""
    if live is not None and (live["kind"] == "reward") != (candidate.kind == "reward"):
        what, fix = f"{alias} is the name of a {live['kind']} adapter", "choose another --alias"
        raise ConfigError.at("--alias", what, live["kind"], candidate.kind, fix)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _numbers(alias: Alias) -> str:
    return "one of " + ", ".join(f"v{n}" for n in sorted(alias.versions))
