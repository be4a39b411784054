"""The bad inputs of the fault list (data files, configuration, resources, models), and the tests that give them to the program.

`pytest tests/unit tests/integration --bad-input-table table.md` runs those tests alone and counts, by row, inputs tried and inputs
answered as they must be: message, exit code, time, nothing written or lost.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

TITLES = {
    1: "broken JSON", 2: "last line cut off", 3: "a field missing in a row", 4: "null field", 5: "number where text belongs",
    6: "empty file", 7: "only blank lines", 8: "UTF-16", 9: "a byte of Latin-1", 10: "byte order mark, CRLF",
    11: "a JSON array in .jsonl", 12: "NaN as a number", 13: "a row of 20 MB", 14: "3,000 levels of nesting",
    15: "duplicate keys", 16: "lone surrogate, NUL", 17: "chosen equals rejected", 18: "same prompt in train and eval",
    19: "empty or blank prompt", 20: "prompt longer than the context", 21: "reply empty after truncation",
    22: "special tokens and chat markers in text", 23: "fewer rows than a batch", 24: "data changed since the checkpoint",
    25: "not what its name says; folder, FIFO, link loop", 26: "missing or unreadable path",
    27: "one-sided preferences, constant rewards",
    28: "unknown key", 29: "wrong type", 30: "YAML 1.1 traps", 31: "duplicate YAML key, tags", 32: "number out of range",
    33: "lora_alpha, lora_dropout", 34: "lora.r", 35: "target_modules matching nothing", 36: "one target matching nothing",
    37: "regular expression as target", 38: "misspelt choice", 39: "adaptive without a target", 40: "sizes that do not divide",
    41: "more GPUs than any node has", 42: "roles that do not fit together", 43: "workers and GPUs that cannot be",
    44: "what a CPU cannot do", 45: "reply longer than the context", 46: "sampling settings", 47: "base missing, offline",
    48: "adapter of another base", 49: "adapter of another shape", 50: "adapter that lacks tensors",
    51: "reward model with another tokenizer", 52: "no eos, no pad, no chat template", 53: "more tokens than embeddings",
    54: "causal LM as reward model", 55: "output_dir unusable", 56: "resume with a changed configuration",
    57: "resume of something else", 58: "save every 0 steps, keep 0", 59: "run names", 60: "seeds",
    61: "sweeps of nothing or too much", 62: "Ray or Python of the cluster differs",
}  # fmt: skip
"""Row -> what is wrong with the input."""

UNIT = "tests/unit/"
TESTS: dict[str, tuple[int, ...]] = {
    UNIT + "data/test_faults.py::test_content*": (),
    UNIT + "data/test_faults.py::test_paths*": (),
    UNIT + "data/test_faults.py::test_row_*": (),
    UNIT + "data/test_encode.py::test_special_tokens_in_text_are_text": (22,),
    UNIT + "data/test_encode.py::test_chat_markers_of_the_template*": (22,),
    UNIT + "config/test_faults.py::test_a_bad_field_in_the_file*": (),
    UNIT + "config/test_faults.py::test_a_bad_override*": (),
    UNIT + "config/test_faults.py::test_a_run_folder_on_a_store*": (55,),
    UNIT + "config/test_faults.py::test_batch_arithmetic_of_sft": (40,),
    UNIT + "config/test_faults.py::test_a_regular_expression_cannot_hang_the_loader": (37,),
    UNIT + "config/test_yaml.py::test_what_yaml_1_1*": (30,),
    UNIT + "config/test_yaml.py::test_duplicate_keys_are_refused*": (31,),
    UNIT + "config/test_yaml.py::test_tags_are_refused*": (31,),
    UNIT + "config/test_paths.py::test_missing_paths*": (47,),
    UNIT + "config/test_paths.py::test_offline*": (47,),
    UNIT + "models/test_sources.py::*::test_a_missing_folder*": (47,),
    UNIT + "models/test_sources.py::*::test_a_hub_id_while_offline": (47,),
    UNIT + "models/test_adapters.py::*::test_one_of_two_targets*": (35, 36),
    UNIT + "models/test_adapters.py::*::test_a_missing_key": (50,),
    UNIT + "models/test_adapters.py::*::test_a_renamed_key": (50,),
    UNIT + "models/test_adapters.py::*::test_another_shape": (49,),
    UNIT + "models/test_lineage.py::test_another_base*": (48,),
    UNIT + "models/test_lineage.py::test_every_difference*": (48, 51),
    UNIT + "models/test_merge.py::*another_base*": (48,),
    UNIT + "models/test_tokenizer.py::*::test_no_end_at_all": (52,),
    UNIT + "models/test_tokenizer.py::*::test_nothing_left": (52,),
    UNIT + "models/test_tokenizer.py::*::test_pad_equal_to_eos*": (52,),
    UNIT + "models/test_backbone.py::*::test_a_model_without_end": (52,),
    UNIT + "models/test_backbone.py::*::test_more_tokens_than_embeddings": (53,),
    UNIT + "models/test_backbone.py::*::test_what_a_cpu_cannot_do*": (44,),
    UNIT + "models/test_backbone.py::*::test_a_causal_lm_is_no_reward_model": (54,),
    UNIT + "models/test_backbone.py::*::test_three_labels_are_no_reward": (54,),
    UNIT + "storage/test_run_folder.py::*::test_foreign_folders_and_files*": (55,),
    UNIT + "storage/test_run_folder.py::*::test_an_unwritable_place*": (55,),
    UNIT + "storage/test_run_folder.py::*::test_a_checkpoint_of_another_run*": (57,),
    UNIT + "launch/test_preflight.py::test_more_gpus_than_any_node_has": (41,),
    UNIT + "launch/test_preflight.py::test_more_workers*": (41,),
    UNIT + "launch/test_preflight.py::test_roles_that_fit_alone*": (42,),
    UNIT + "launch/test_ray_join.py::test_another_version*": (62,),
    UNIT + "launch/test_launch.py::test_*refused*": (41, 43),
    UNIT + "training/test_run_entry.py::test_a_changed_setting*": (56,),
    UNIT + "sweep/test_space.py::test_badly_written_spaces*": (61,),
    UNIT + "sweep/test_space.py::test_all_problems_at_once*": (61,),
    UNIT + "cli/test_runs.py::test_what_cannot_be_used*": (),
    "tests/integration/ppo/test_guards.py::test_jobs_that_cannot_run*": (),
    "tests/integration/ppo/test_guards.py::test_equal_rewards_are_told*": (27,),
}
"""Pattern of a test's name -> rows; none: the row is the number that the test's own parameter begins with."""

_OWN_ROW = re.compile(r"(?:\[(?:fault |row )?|::test_row_)(\d+)")


def rows_of(nodeid: str) -> tuple[int, ...]:
    """The rows of the fault list that a test stands for."""
    for pattern, rows in TESTS.items():
        if fnmatchcase(nodeid, pattern.replace("[", "[[]")):
            found = _OWN_ROW.search(nodeid)
            return rows or ((int(found[1]),) if found and int(found[1]) in TITLES else ())
    return ()


@dataclass
class Counts:
    tried: int = 0
    passed: int = 0


@dataclass
class BadInputTable:
    """What was tried and what held, by row."""

    rows: defaultdict[int, Counts] = field(default_factory=lambda: defaultdict(Counts))

    def note(self, nodeid: str, passed: bool) -> None:
        for row in rows_of(nodeid):
            self.rows[row].tried += 1
            self.rows[row].passed += passed

    def lines(self) -> list[str]:
        """A table in Markdown; a row without a test shows as tried 0 times."""
        body = [f"| {n} | {TITLES[n]} | {self.rows[n].tried} | {self.rows[n].passed} |" for n in TITLES]
        total = [sum(getattr(c, name) for c in self.rows.values()) for name in ("tried", "passed")]
        return ["| # | input | tried | answered |", "|---|---|---|---|", *body, f"| | all | {total[0]} | {total[1]} |"]
