"""The inputs that come with the shared data, each a case from a public report, given to the product; and the table of what it did.

    make inputs                                        all; rewrites the table in tests/README.md
    python -m tests.shared_inputs --only 17-sharegpt   this one; --folder F keeps models and rows in F, and goes on from there

They lie in `inputs` beside the folder RLHF_RAY_DATA, each with a README that says what is right, and scripts that make their models
(a minute of a core). A case works on a copy, in this process; what it returns is told, and an exception is what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"

from tests.readme_tables import put

ROOT = Path(__file__).parents[1]
README = ROOT / "tests" / "README.md"
LETTERS = 95
"""Of a TMPDIR in which Ray's sockets have no room."""
NOT_RUN = {"23-proxy": ("a proxy in the environment that answers nothing disturbs no run", "two minutes under Ray")}
"""Folder -> what is right, and why it is left out here."""


def none_reward() -> str:
    """None adds nothing to the sum; a reward's mean is over the rows that have it; nothing stops"""
    done, _ = run("01-none-reward/ppo.yaml")
    rows = [row for row in metrics_of(done) if "reward/mean" in row]
    for row in rows:
        share = row["reward_applies/sums"]
        assert row.get("reward/sums", 1.0) == 1.0 and row.get("reward/code", 0.5) == 0.5, row
        assert abs(row["reward/mean"] - (share + 0.5 * (1 - share))) < 1e-6 and "faults/rewards_left_out" not in row, (
            row
        )
    assert len(rows) == 2 and run("01-none-reward/ppo_weight0.yaml")[0].status == "done"
    table = run("01-none-reward/ev.yaml")[0].metrics
    assert table["reward/sums/base"] == 1.0 and table["reward/code/base"] == 0.5, table
    return f"reward/sums 1, reward/code 0.5; the evaluation's mean {table['reward/base']:.3g} over all its rows; all three finish"


def special_text() -> str:
    """markers in a text are tokens, or warned of with a count; /v1/completions reads them as tokens: 12"""
    lines = checked("02-special-text/sft.yaml")
    (told,) = [line for line in lines if "spell special tokens" in line]
    parsed = checked("02-special-text/sft.yaml", "data.special_tokens=parse")
    assert any(re.search(r":1, 21 tokens", line) for line in parsed), parsed
    with service("models/chatml") as post:
        used = answer(post("completions", read("02-special-text/request.json")))["usage"]["prompt_tokens"]
    assert used == 12, used
    count = told.removeprefix("warning: ").split(":")[0]
    return f"warned: {count}; 20 tokens and eos with data.special_tokens: parse; 12 prompt tokens"


def multi_turn() -> str:
    """both turns of the assistant are learnt"""
    text = "\n".join(checked("03-multi-turn/sft.yaml"))
    assert "\u00abFIRST" in text and "\u00abSECOND" in text, text
    return "FIRST and SECOND are learnt"


def turn_end() -> str:
    """a reply ends where the template ends a turn, in serving and in SFT, though eos is another token"""
    text = "\n".join(checked("04-turn-end/sft_endless.yaml"))
    assert "<|im_end|>\u00bb" in text, text
    return f"{stopped('04-turn-end')}; the last label is <|im_end|>"


def logprob_bytes() -> str:
    """the bytes of all tokens, joined, are those of the content before replacement; offsets index the text"""
    asked = read("05-logprob-bytes/request.json")
    with service("models/chatml") as post:
        (said,) = answer(post("chat/completions", asked))["choices"]
        fields = {k: asked[k] for k in ("model", "temperature", "max_tokens", "seed")}
        (plain,) = answer(post("completions", {**fields, "prompt": "zq1", "logprobs": 0}))["choices"]
    tokens = said["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in tokens)
    assert joined.decode("utf-8", "replace") == said["message"]["content"], (joined, said)
    assert all(token["bytes"] == [] for token in tokens if token["token"].startswith("<|")), tokens
    offsets = plain["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(plain["text"]), (offsets, plain["text"])
    return f"{len(joined)} bytes of {len(tokens)} tokens are the content; special tokens have none; offsets end within the text"


def experts() -> str:
    """a warning that all-linear does not adapt the experts, or target_parameters"""
    _, told = run("06-moe/sft.yaml")
    (line,) = [line for line in told.splitlines() if "experts" in line and "warning" in line][:1]
    return "warned: " + line.partition("warning: ")[2].partition(";")[0]


def special_stop() -> str:
    """a special token as stop string ends the reply: 'Hello there.'"""
    return stopped("07-special-stop")


def history() -> str:
    """fields that are null, empty or neutral change nothing: 200"""
    requests = [json.loads(line) for line in Path("08-history/requests.jsonl").read_text().splitlines()]
    with service("models/chatml") as post:
        found = [post("chat/completions", request)[0] for request in requests]
    assert set(found) == {200}, found
    return f"200 for all {len(found)}"


def date() -> str:
    """one date for a chain, though a day passes between its stages"""
    import datetime

    import transformers.utils.chat_template_utils as clock

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=1)

    first = dated_sft()
    before = clock.datetime
    try:
        clock.datetime = Later  # type: ignore[misc]
        second, _ = run("09-date/ppo.yaml")
    finally:
        clock.datetime = before  # type: ignore[misc]
    said = Path(second.run_dir, "samples.jsonl").read_text()
    templates = [manifest_of(folder)["template"] for folder in (first, second.run_dir)]
    assert templates[0]["date"] == templates[1]["date"] and templates[0]["sha256"] == templates[1]["sha256"], templates
    told = datetime.datetime.fromisoformat(templates[0]["date"]).strftime("%d %b %Y")
    assert told in said, (told, said[:300])
    return "PPO's prompts, a day later, say the date that the SFT run has recorded"


def hub_config() -> str:
    """a field for the configuration, and an error that names main and socratic"""
    from rlhf_ray.data.tables import read_hub
    from rlhf_ray.errors import DataError

    os.chdir("11-hub-config")
    try:
        try:
            list(read_hub("hubset", "train", 10**6, None, False))
            raise AssertionError("no error")
        except DataError as error:
            told = str(error)
        rows = len(list(read_hub("hubset", "train", 10**6, "main", False)))
    finally:
        os.chdir("..")
    assert "main" in told and "socratic" in told and "data.name" in told, told
    return f"the error names both, and data.name; with it {rows} rows"


def further() -> str:
    """one more epoch, or a named way to go on from a finished adapter"""
    from rlhf_ray.console import NullConsole
    from rlhf_ray.errors import ConfigError
    from rlhf_ray.stages.resume import resume

    done, _ = run("12-further/sft.yaml")
    try:
        resume(done.run_dir, NullConsole(), overrides=["num_train_epochs=2"])
        raise AssertionError("it was resumed, and nothing was said")
    except ConfigError as error:
        told = error.problems[0].fix
    assert "rlhf-ray sft JOB sft=" in told, told
    again, _ = run("12-further/sft.yaml", f"sft={done.run_dir}", "output_dir=out/12-further")
    parents = [parent["path"] for parent in manifest_of(again.run_dir)["parents"]]
    assert again.steps == done.steps and any("/out/12/" in f"{path}/" for path in parents), parents
    return f"refused, with the way: rlhf-ray sft JOB sft=RUN output_dir=..., which trains its adapter {again.steps} steps further"


def space() -> str:
    """prompt + reply is one text: 'Once upon a time', in rewards and in the service"""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run("13-space/ppo.yaml")
    joined = re.findall(r"JOINED ['\"](Once upon.*)['\"]", said.getvalue())
    begun = sum(text.startswith("Once upon ") for text in joined)
    with service("../data/models/stories260K") as post:
        asked = read("13-space/request.json")
        text = asked["prompt"] + answer(post("completions", asked))["choices"][0]["text"]
    assert text.startswith("Once upon a time") and joined and begun > len(joined) / 2, (text, joined)
    return f"{text!r}; {begun} of {len(joined)} sampled replies to 'Once upon' begin with the blank"


def echo() -> str:
    """prompt tokens with their log-probabilities"""
    with service("models/chatml") as post:
        (found,) = answer(post("completions", read("15-echo/request.json")))["choices"]
    logprobs = found["logprobs"]
    first, *others = logprobs["token_logprobs"]
    assert found["text"] == "a b" and first is None and others and all(value < 0 for value in others), found
    return f"tokens {logprobs['tokens']}, log-probability of each but the first"


def sharegpt() -> str:
    """16 rows, 'b' learnt; a prompt of PPO ends after 'a0'"""
    from rlhf_ray.config import PPOConfig
    from rlhf_ray.config.load import load_dict
    from rlhf_ray.stages.data_check import check_data

    lines = checked("17-sharegpt/r.yaml")
    assert "16 rows of format sharegpt" in lines[0] and "\u00abb<|im_end|>\u00bb" in "\n".join(lines), lines
    data = {"train": "17-sharegpt/r.jsonl", "format": "sharegpt", "held_out_fraction": 0}
    job = {"output_dir": "out/x", "model_name_or_path": "models/chatml", "template": "chat", "data": data}
    values = {**job, "rewards": [{"function": "01-none-reward/r0.py:always"}], "response_length": 8}
    asked = "\n".join(check_data(load_dict(PPOConfig, values), 1).lines[-4:])
    assert asked.endswith("user\na0<|im_end|>\n<|im_start|>assistant\n"), asked
    return "16 rows, b learnt; the prompt ends after a0, where the assistant begins"


def system_role() -> str:
    """on_bad_row: skip leaves out the row that the template refuses: 1 counted, 49 kept"""
    found = []
    for changed in ((), ("data.train=18-system-role/two_turns.jsonl", "template=alpaca_short")):
        lines = checked("18-system-role/sft.yaml", *changed)
        (told,) = [line for line in lines if line.startswith("1 skipped")]
        kept = sum(int(line.split()[-1]) for line in lines if re.match(r" *\d+-\d+ [ #]+\d+$", line))
        assert kept == 49, (told, kept)
        found.append(re.sub(r" \(.*", "", told))
    return "49 kept; " + "; ".join(found)


def peft() -> str:
    """a regular expression is resolved; ranks, alphas, layers, saved modules are read or refused with a reason"""
    from rlhf_ray.console import NullConsole
    from rlhf_ray.errors import RlhfRayError
    from rlhf_ray.stages.generate import generate

    replied, refused = list[str](), list[str]()
    for folder in sorted(Path("adapters").iterdir()):
        try:
            generate(
                policies=[str(folder)], instruction="Hi", model="models/chatml", max_new_tokens=4, console=NullConsole()
            )
            replied.append(folder.name)
        except RlhfRayError as error:
            refused.append(f"{folder.name} ({error.problems[0].what})")
    assert {"plain", "regex"} <= set(replied), refused
    return f"replies with {', '.join(replied)}" + (f"; refuses {', '.join(refused)}" if refused else "")


def tmpdir() -> str:
    """one line 'TMPDIR too long, at most N letters', exit 2 or 3"""
    dated_sft()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "t" * (LETTERS - len(place) - 1))
        folder.mkdir()
        env = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        env.pop("RAY_TMPDIR", None)
        command = [sys.executable, "-m", "rlhf_ray.cli", "ppo", "22-tmpdir/ppo.yaml"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    told = [line for line in done.stderr.splitlines() if "TMPDIR" in line]
    assert done.returncode in (2, 3) and len(told) == 1 and "too long" in told[0], done.stderr[-2000:]
    return f"exit {done.returncode}: " + re.sub(r"got .*?; ", "", told[0].partition("error: ")[2])


CASES: dict[str, Callable[[], str]] = {
    "01-none-reward": none_reward, "02-special-text": special_text, "03-multi-turn": multi_turn, "04-turn-end": turn_end,
    "05-logprob-bytes": logprob_bytes, "06-moe": experts, "07-special-stop": special_stop, "08-history": history,
    "09-date": date, "11-hub-config": hub_config, "12-further": further, "13-space": space, "15-echo": echo,
    "17-sharegpt": sharegpt, "18-system-role": system_role, "19-peft": peft, "22-tmpdir": tmpdir,
}  # fmt: skip
"""Folder -> its case, which runs in the copy and says in its docstring what is right."""


def run(path: str, *overrides: str) -> tuple[Any, str]:
    """The finished run of a job file, and what it said."""
    from rlhf_ray.config.load import load_any
    from rlhf_ray.console import LocalConsole
    from rlhf_ray.stages import start

    said = io.StringIO()
    stage, config = load_any(path, overrides)
    return getattr(start, stage)(config, LocalConsole(file=said)), said.getvalue()


def checked(path: str, *overrides: str) -> list[str]:
    """What `rlhf-ray data check` says of a job's data, with its first row."""
    from rlhf_ray.config.load import load_any
    from rlhf_ray.stages.data_check import check_data

    config: Any = load_any(path, ("data.held_out_fraction=0", *overrides), "sft")[1]
    return list(check_data(config, 1).lines)


def metrics_of(done: Any) -> list[dict[str, Any]]:
    from rlhf_ray.metrics import read_metrics

    return read_metrics(Path(done.run_dir) / "metrics.jsonl")


def manifest_of(folder: str) -> dict[str, Any]:
    from rlhf_ray.storage.run_folder import open_run

    return dict(open_run(folder, verify=False).manifest())


def dated_sft() -> str:
    """The SFT run that two cases begin from."""
    folder = "out/09sft"
    return folder if Path(folder, "manifest.json").is_file() else str(run("09-date/sft.yaml")[0].run_dir)


def stopped(folder: str) -> str:
    with service("models/chatml_endless") as post:
        (found,) = answer(post("chat/completions", read(f"{folder}/request.json")))["choices"]
    told = (found["finish_reason"], found["message"]["content"])
    assert told == ("stop", "Hello there."), told
    return "finish_reason stop, content 'Hello there.'"


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


@contextlib.contextmanager
def service(model: str) -> Iterator[Callable[[str, Any], tuple[int, Any]]]:
    """The service over a base, its event loop in a thread of this process: what is posted to /v1/... -> status and answer."""
    from rlhf_ray.config import ServeConfig
    from tests.unit.serve.conftest import LiveService

    live = LiveService(ServeConfig(output_dir=tempfile.mkdtemp(dir="out"), model_name_or_path=model))

    def post(path: str, body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{live.url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as found:
                return found.status, json.load(found)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    try:
        yield post
    finally:
        live.close()


def answer(found: tuple[int, Any]) -> Any:
    assert found[0] == 200, found
    return found[1]


def prepare(inputs: Path, folder: Path, steps: int | None = None) -> None:
    """A copy of `inputs` in `folder`, with the models that its scripts make, beside a link to the shared data.

    steps: of their training, where only their tokenizers matter; default: as the scripts say."""
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    beside = folder.parent / "data"
    if not beside.exists():
        beside.symlink_to(inputs.parent / "data")
    for name in ("models", "adapters", "out"):
        (folder / name).mkdir(exist_ok=True)
    if (folder / "models" / "chatml_nosys").is_dir():
        return
    scripts = "\n".join((folder / f"make_{name}.py").read_text() for name in ("models", "endless", "others"))
    if steps is not None:
        scripts = re.sub(r"in range\(\d{3}\)", f"in range({steps})", scripts)
    subprocess.run([sys.executable, "-"], input=scripts, text=True, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    variants = {
        "chatml_date": "{{ strftime_now('%d %b %Y') }}",
        "chatml_nosys": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    }
    from transformers import AutoTokenizer

    for name, before in variants.items():
        shutil.copytree(folder / "models" / "chatml", folder / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
        tokenizer.chat_template = before + tokenizer.chat_template
        tokenizer.save_pretrained(folder / "models" / name)


def attempt(name: str, folder: Path) -> dict[str, str]:
    """The row of one case; its function works in `folder`."""
    case, before = CASES[name], Path.cwd()
    os.chdir(folder)
    try:
        got = case()
    except Exception as error:
        got = f"**no:** {type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    return {"folder": name, "right": cell(str(case.__doc__)), "got": cell(got.replace(f"{folder.parent}/", "")[:400])}


def cell(text: str) -> str:
    return " ".join(text.replace("|", "&#124;").replace("<", "&lt;").split())


def table(rows: dict[str, dict[str, str]]) -> str:
    """In the order of the folders, those that were not run last."""
    tried = [rows[name] for name in CASES if name in rows]
    fine = sum(not row["got"].startswith("**no:**") for row in tried)
    lines = [f"{fine} of {len(tried)} cases are answered right.", "", "| folder | right | got |", "|---|---|---|"]
    lines += [f"| {row['folder']} | {row['right']} | {row['got']} |" for row in tried]
    return "\n".join(
        [*lines, *(f"| {name} | {right} | not run here: {why} |" for name, (right, why) in NOT_RUN.items())]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="folders, comma separated; default: all")
    parser.add_argument(
        "--folder", type=Path, help="a copy of the inputs that is kept, with rows that are done; default: none is"
    )
    options = parser.parse_args()
    inputs = Path(os.environ.get("RLHF_RAY_DATA") or "data").resolve().parent / "inputs"
    if not inputs.is_dir():
        print(f"no inputs at {inputs}; set RLHF_RAY_DATA", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        root = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(inputs, root / "inputs")
        done = root / "rows.jsonl"
        rows = {row["folder"]: row for row in map(json.loads, done.read_text().splitlines())} if done.exists() else {}
        for name in options.only.split(",") if options.only else CASES:
            if name not in rows:
                rows[name] = attempt(name, root / "inputs")
                print(json.dumps(rows[name]), flush=True)
                with done.open("a") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        README.write_text(put(README.read_text(), "inputs", table(rows)))
    return int(any(row["got"].startswith("**no:**") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
