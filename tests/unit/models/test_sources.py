"""Which models are taken, and the one line for each that is not (faults 47, 54; F36, F37; section 5 'What may be loaded')."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.backbone import load_backbone
from rlhf_ray.models.sources import check_files, config_sha256, resolve_source, weight_files, weights_sha256

from .conftest import SETTINGS


@pytest.fixture
def copy(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama(), tmp_path / "Base-Model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestLocalFolders:
    def test_a_model_folder_is_itself(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """F37: a relative path is recorded as an absolute one, so that an artefact means the same from any folder."""
        monkeypatch.chdir(copy.parent)
        source = resolve_source("Base-Model")
        assert (source.folder, source.name, source.revision) == (copy, str(copy), None)
        assert check_files(source)["model_type"] == "llama"

    @pytest.mark.parametrize("path", ["/no/such/model", "./no-such", "a/b/c", "~/no-such-model-here", "bad name"])
    def test_a_missing_folder(self, path: str) -> None:
        with pytest.raises(ConfigError, match="not found locally; offline mode") as e:
            resolve_source(path)
        assert e.value.exit_code == 2 and len(e.value.lines()) == 1

    def test_a_hub_id_while_offline(self) -> None:
        with pytest.raises(ConfigError, match="someone/some-model: not found locally; offline mode"):
            resolve_source("someone/some-model")

    def test_a_file(self, copy: Path) -> None:
        with pytest.raises(ConfigError, match="is a file"):
            resolve_source(str(copy / "config.json"))

    @pytest.mark.parametrize("path", ["tatsu-lab/alpaca-7b-wdiff", "/models/reward-model-wdiff/"])
    def test_weight_differences_are_not_weights(self, path: str) -> None:
        with pytest.raises(ConfigError, match="rlhf-ray import weight-diff"):
            resolve_source(path)

    def test_a_raw_meta_checkpoint(self, tmp_path: Path) -> None:
        for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigError, match="raw Meta checkpoint"):
            resolve_source(str(tmp_path))

    @pytest.mark.parametrize("with_config", [False, True])
    def test_an_adapter_is_no_base(self, tmp_path: Path, with_config: bool) -> None:
        """With a config.json beside it, transformers would load the adapter's base and the adapter in silence."""
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        if with_config:
            (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="model_name_or_path=org/base"):
            resolve_source(str(tmp_path))

    def test_a_run_is_no_base(self, tmp_path: Path) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "manifest.json").write_text("{}")
        with pytest.raises(ConfigError, match="rlhf-ray merge"):
            resolve_source(str(tmp_path))

    def test_anything_else(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not a model"):
            resolve_source(str(tmp_path))


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestWhatMayBeLoaded:
    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_code_of_the_model_is_never_run(self, copy: Path, file: str) -> None:
        """A type that transformers does not know is refused; of one that it knows, its own code is used."""
        edit(copy / file, auto_map={"AutoModelForCausalLM": "modeling.Evil", "AutoTokenizer": ["tok.Evil", None]})
        for name in ("modeling.py", "tok.py"):
            (copy / name).write_text("raise SystemExit('ran')")
        base = load_backbone(path=str(copy), **SETTINGS)
        assert type(base.model).__name__ == "LlamaForCausalLM" and not hasattr(base.model.config, "auto_map")
        edit(copy / "config.json", model_type="evil")
        with pytest.raises(ArtifactError, match="auto_map is refused") as e:
            check_files(resolve_source(str(copy)))
        assert e.value.exit_code == 5 and file in str(e.value)

    def test_a_config_cannot_choose_the_weight_file(self, copy: Path) -> None:
        edit(copy / "config.json", transformers_weights="../../elsewhere.safetensors")
        with pytest.raises(ArtifactError, match="transformers_weights is refused"):
            check_files(resolve_source(str(copy)))

    def test_pickled_weights_are_tensors_or_nothing(self, copy: Path) -> None:
        expected = load_backbone(path=str(copy), **SETTINGS).model.state_dict()
        (copy / "model.safetensors").unlink()
        torch.save(expected, copy / "pytorch_model.bin")
        found = load_backbone(path=str(copy), **SETTINGS).model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
        torch.save({**expected, "evil": Evil(copy / "ran")}, copy / "pytorch_model.bin")
        with pytest.raises(ArtifactError, match="hold more than tensors"):
            load_backbone(path=str(copy), **SETTINGS)
        assert not (copy / "ran").exists()

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        with pytest.raises(ArtifactError, match="no weights"):
            check_files(resolve_source(str(copy)))

    def test_shards_must_all_be_there_and_lie_here(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        index = copy / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "../m-2.safetensors", "c": "m-3.bin"}})
        )
        with pytest.raises(ArtifactError) as e:
            weight_files(copy)
        assert [p.what.split()[0] for p in e.value.problems] == ["refused", "shard", "refused"]
        index.write_text(json.dumps({"weight_map": {}}))
        with pytest.raises(ArtifactError, match="weight_map"):
            weight_files(copy)


class TestIdentity:
    def test_it_moves_with_the_files_and_sees_every_bit(self, copy: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(copy, tmp_path / "other"))
        assert (weights_sha256(copy), config_sha256(copy)) == (weights_sha256(other), config_sha256(other))
        before = weights_sha256(other)
        data = bytearray((other / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (other / "model.safetensors").write_bytes(data)
        assert weights_sha256(other) != before

    def test_shards_are_one_identity(self, tmp_path: Path) -> None:
        parts = {"m-1.safetensors": {"a": torch.ones(2)}, "m-2.safetensors": {"b": torch.zeros(2)}}
        for name, tensors in parts.items():
            save_file(tensors, tmp_path / name)
        table = {"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(table))
        first = weights_sha256(tmp_path)
        save_file({"b": torch.ones(2)}, tmp_path / "m-2.safetensors")
        assert weights_sha256(tmp_path) != first

    def test_of_one_file_and_shards_it_names_what_is_loaded(self, copy: Path) -> None:
        """The lineage used to hold the hash of the shards, while transformers loads the file."""
        before, whole = weights_sha256(copy), load_file(copy / "model.safetensors")
        save_file({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, copy / "m-1.safetensors")
        table = {"metadata": {}, "weight_map": dict.fromkeys(whole, "m-1.safetensors")}
        (copy / "model.safetensors.index.json").write_text(json.dumps(table))
        base = load_backbone(path=str(copy), **SETTINGS)
        assert torch.equal(base.model.get_input_embeddings().weight, whole["model.embed_tokens.weight"])  # type: ignore[arg-type]
        assert base.identity.weights_sha256 == before

    def test_who_saved_a_config_does_not_matter_and_what_it_says_does(self, copy: Path) -> None:
        first = config_sha256(copy)
        edit(copy / "config.json", transformers_version="9.9.9", dtype="bfloat16", _name_or_path="/elsewhere")
        assert config_sha256(copy) == first
        edit(copy / "config.json", rms_norm_eps=1e-5)
        assert config_sha256(copy) != first


COMMIT = "c" * 40


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the Hub does for a gated, a missing and a private repository, and for those in `files`."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    """Of each repository, by name."""
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name, _, rest = self.path.removeprefix("/api/models").strip("/").partition("?")[0].partition("/")
        repo, _, what = rest.partition("/")
        found = self.files.get(f"{name}/{repo}")
        if found is None:
            self._refuse()
        elif what.startswith("resolve/"):
            file = what.rpartition("/")[2]
            self.fetched += [file] if self.command == "GET" else []
            self._send(found[file])
        elif what.startswith("tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": f"{len(d):040}"} for n, d in found.items()]
            self._send(json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": n} for n in found]
            self._send(json.dumps({"id": f"{name}/{repo}", "sha": COMMIT, "siblings": siblings}).encode())

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        for key, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{len(data)}"'), ("Content-Length", str(len(data)))):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self) -> None:
        gated = "/gated/" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """The real Hub client, against a local server that answers as the Hub does; after the test against none at all."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(_Hub, "files", {})
    monkeypatch.setattr(_Hub, "fetched", [])
    yield _Hub
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match="does not answer"):
        resolve_source("someone/some-model")


def test_gated_and_missing_repositories_online(hub: type[_Hub]) -> None:
    with pytest.raises(ConfigError, match=r"gated/llama is a gated repository.*hf auth login"):
        resolve_source("gated/llama")
    with pytest.raises(ConfigError, match="nobody/nothing: not found"):
        resolve_source("nobody/nothing")


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_pickled_weights_are_fetched_where_there_are_no_others(
    hub: type[_Hub], copy: Path, has_safetensors: bool
) -> None:
    """Many repositories have pytorch_model.bin alone: nothing was fetched of them but their JSON."""
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    weights = files.pop("model.safetensors")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    files |= {"pytorch_model.bin": (copy / "pytorch_model.bin").read_bytes(), "training_args.bin": b"a pickle"}
    if has_safetensors:
        files["model.safetensors"] = weights
    hub.files["someone/model"] = files
    source = resolve_source("someone/model")
    assert (source.name, source.revision) == ("someone/model", COMMIT)
    expected = "model.safetensors" if has_safetensors else "pytorch_model.bin"
    assert [p.name for p in weight_files(source.folder)] == [expected]
    assert set(hub.fetched) & {"model.safetensors", "pytorch_model.bin", "training_args.bin"} == {expected}
    assert resolve_source("someone/model") == source  # once more, from the cache
