"""What a merge is asked to do: model references and the recipe, as words and as JSON.

`MergeRecipe` is what the command line, `merge_config.json` and Python callers have in common. It names things and
validates what can be validated without reading anything; `pipeline.merge` carries it out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef, check_new_repo_id
from hf_epimer.methods import DEFAULT_METHOD, find_method
from hf_epimer.outside import expanded, parse_json, read_text
from hf_epimer.types import Precision

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class MergeRecipe:
    """Everything that decides the result of one merge, and where it goes.

    Attributes:
        models: what to merge.
        base: theta_0; None to infer it from cards or config.
        method: a name from METHODS.
        options: an instance of that method's config; its defaults for None.
        weights: one per model, normalised to sum to 1; None for equal weights.
        fisher: statistics, by label or one per model in order; folders, files or repos with fisher.safetensors.
        samples: per task, where curvature has to be estimated.
        max_data: gigabytes (10^9 bytes) of a data set on the Hub beyond which its samples are streamed.
        calibrate: solve the merge's linear layers again in forward order, on `samples` images of every task; None for
            what the method does by itself: `epimer-core` where there are images, no other.
        views: of a calibration: how often every image is seen, whole and as random crops.
        calibration_rho: of a calibration: how strongly a layer is held where it is, in units of the mean squared input.
        mixed_precision: of the passes for statistics and calibration, "no" or "bf16"; sums are in float32 or better.
        refine: train the merge towards the features of its models, on `samples` images of every task without labels.
        refine_steps: of that training.
        tune_alpha: choose alpha by how near the predictions come to the fine-tuned models' on those images.
        evaluate: measure the result on every model's task.
        limit: of `evaluate`: the first so many test images per task; None for all.
        compare: of `evaluate`: measure the base and the fine-tuned models, too.
        eval_results: of `evaluate`: benchmark data sets, `id[:task id]`, for which the Hub shall list the accuracy.
        tasks: task files.
        out: folder to write; `./merged-<method>` when neither it nor `push_to` is given.
        overwrite: replace a non-empty `out`.
        push_to: `org/name` to push to.
        private: create that repo private.
        create_pr: open a pull request instead of committing.
        device: where layers are solved.
        dtype: of the written weights; None for that of the base.
        seed: of everything random.
        exact: float64, full decompositions and dense solves.
        out_rank: of adapters alone: the largest rank of the merged adapter's layers; None for what they need.
        dense: of adapters alone: fold the merged adapter into the base and write a full checkpoint.
        full: write the merged vision tower in the base's whole model, with its text tower and tokenizer.
        skip: of models of no known family: patterns of names of parameters that stay as they are in the base.
        command: the words that were typed, for the card; nothing else depends on them.
    """

    models: tuple[ModelRef, ...]
    base: ModelRef | None = None
    method: str = DEFAULT_METHOD
    options: Any = None
    weights: tuple[float, ...] | None = None
    fisher: tuple[ModelRef, ...] = ()
    samples: int = 256
    max_data: float = 2.0
    calibrate: bool | None = None
    views: int = 1
    calibration_rho: float = 0.2
    mixed_precision: Precision = "no"
    refine: bool = False
    refine_steps: int = 100
    tune_alpha: bool = False
    evaluate: bool = False
    limit: int | None = None
    compare: bool = False
    eval_results: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    out: str | None = None
    overwrite: bool = False
    push_to: str | None = None
    private: bool = False
    create_pr: bool = False
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    exact: bool = False
    out_rank: int | None = None
    dense: bool = False
    full: bool = False
    skip: tuple[str, ...] = ()
    command: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("give at least one checkpoint to merge")
        if not all(isinstance(ref, ModelRef) for ref in self.models):
            raise UsageError("models are ModelRef objects: ModelRef.parse('org/name')")
        for item in fields(self):
            value = getattr(self, item.name)
            is_switch = isinstance(item.default, bool) or item.name == "calibrate"
            if is_switch and value is not item.default and not isinstance(value, bool):
                raise UsageError(f"--{item.name.replace('_', '-')} is a switch, true or false, not {value!r}")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise UsageError(f"--samples must be a whole number of at least 1, not {self.samples!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be a whole number from 0 to 2^63 - 1, not {self.seed!r}")
        if not isinstance(self.max_data, int | float) or not self.max_data >= 0:
            raise UsageError(f"--max-data must be a number of gigabytes of at least 0, not {self.max_data!r}")
        if self.out_rank is not None and (not isinstance(self.out_rank, int) or self.out_rank < 1):
            raise UsageError(f"--out-rank must be a whole number of at least 1, not {self.out_rank!r}")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise UsageError(f"--limit must be a whole number of at least 1, not {self.limit!r}")
        if not isinstance(self.views, int) or not 1 <= self.views <= 64:
            raise UsageError(f"--views must be a whole number from 1 to 64, not {self.views!r}")
        if not isinstance(self.calibration_rho, int | float) or not 1e-6 <= self.calibration_rho <= 1e6:
            raise UsageError(f"--calibration-rho must be a number from 1e-6 to 1e6, not {self.calibration_rho!r}")
        if self.mixed_precision not in get_args(Precision):
            raise UsageError(f"--mixed-precision is no or bf16, not {self.mixed_precision!r}")
        if not isinstance(self.refine_steps, int) or not 1 <= self.refine_steps <= 1_000_000:
            raise UsageError(f"--refine-steps must be a whole number from 1 to 1000000, not {self.refine_steps!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for flag in ("compare", "eval_results"):
            if getattr(self, flag) and not self.evaluate:
                raise UsageError(f"--{flag.replace('_', '-')} needs --evaluate")
        if self.eval_results and self.limit:
            raise UsageError("--eval-results is for accuracies on all test images: leave --limit out")
        if self.push_to is not None:
            check_new_repo_id(self.push_to, "--push-to")
        for flag in ("create_pr", "private"):
            if getattr(self, flag) and self.push_to is None:
                raise UsageError(f"--{flag.replace('_', '-')} needs --push-to")

    @property
    def target(self) -> Path:
        """The folder that is written."""
        return expanded(self.out or f"merged-{self.method}")

    def command_line(self) -> str:
        """The `hf-epimer merge` that makes this merge, for the shell; where the merge goes is left open.

        The recipe has a base and options, as `make_plan(...).recipe` does.
        """
        method = find_method(self.method)
        words = ["hf-epimer", "merge", *map(str, self.models), "--base", str(self.base), "--method", method.name]
        for name, option in method.options.items():
            value = getattr(self.options, name)
            shown = value != option.default or (name in ("rank", "alpha") and value is not None)
            if shown and not (name == "alpha" and self.tune_alpha):
                words += [option.flag, str(value)]
        for flag, values in (
            ("--weights", self.weights),
            ("--fisher", self.fisher),
            ("--task", self.tasks),
            ("--skip", self.skip),
        ):
            words += [flag, *map(str, values)] if values else []
        if self.calibrate or self.refine or self.tune_alpha or (method.statistic(self.options) and not self.fisher):
            words += ["--samples", str(self.samples)]
            words += ["--max-data", str(self.max_data)] if self.max_data != 2.0 else []
        if bool(self.calibrate) != method.calibrates:
            words += ["--calibrate" if self.calibrate else "--no-calibrate"]
        calibration = (("views", 1), ("calibration_rho", 0.2)) if self.calibrate else ()
        refinement = (("refine_steps", 100),) if self.refine else ()
        for name, usual in (
            *calibration,
            *refinement,
            ("mixed_precision", "no"),
            ("device", "cpu"),
            ("dtype", None),
            ("seed", 0),
            ("out_rank", None),
        ):
            value = getattr(self, name)
            words += [f"--{name.replace('_', '-')}", str(value)] if value != usual else []
        words += [
            f"--{name.replace('_', '-')}"
            for name in ("refine", "tune_alpha", "exact", "dense", "full")
            if getattr(self, name)
        ]
        return shlex.join(words)

    def looked_into(self, out: str) -> MergeRecipe:
        """For a command that writes about merges into `out`, layer by layer, none of which is mended or pushed."""
        unpushed = replace(self, push_to=None, private=False, create_pr=False)
        return replace(unpushed, out=out, calibrate=False, refine=False, tune_alpha=False)


_DECIDES = (
    "weights",
    "samples",
    "max_data",
    "calibrate",
    "views",
    "calibration_rho",
    "mixed_precision",
    "refine",
    "refine_steps",
    "evaluate",
    "limit",
    "compare",
    "eval_results",
    "tasks",
    "device",
    "dtype",
    "seed",
    "exact",
    "out_rank",
    "dense",
    "full",
    "skip",
)
"""Fields of a recipe that go into merge_config.json as they are; destinations do not."""


def recipe_to_json(recipe: MergeRecipe) -> dict[str, Any]:
    """The part of a (pinned, resolved) recipe that decides the result."""
    return {
        "method": recipe.method,
        "options": asdict(recipe.options),
        "base": str(recipe.base),
        "models": [str(ref) for ref in recipe.models],
        "fisher": [str(ref) for ref in recipe.fisher],
        **{name: getattr(recipe, name) for name in _DECIDES},
    }


def recipe_from_json(file: Path) -> dict[str, Any]:
    """Keyword arguments for `MergeRecipe` from a merge_config.json.

    Raises:
        UsageError: the file is missing, no JSON, or lacks what a recipe needs.
    """
    try:
        content = parse_json(read_text(file))
        _check_kinds(content)
        method = find_method(_today(content["method"], content["options"]))
        unknown = set(content["options"]) - set(method.options)
        if unknown:
            raise UsageError(f"--config {file}: {method.name} has no option {sorted(unknown)[0]!r}")
        arguments = {name: content[name] for name in _DECIDES if name in content}
        for name in ("weights", "eval_results", "tasks", "skip"):
            if arguments.get(name) is not None:
                arguments[name] = tuple(arguments[name])
        return {
            **arguments,
            "method": method.name,
            "options": method.config(**_OPTIONS_BEFORE.get(method.name, {}) | content["options"]),
            "base": ModelRef.parse(content["base"]),
            "models": tuple(ModelRef.parse(text) for text in content["models"]),
            "fisher": tuple(ModelRef.parse(text) for text in content.get("fisher", ())),
        }
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except UsageError:
        raise
    except (KeyError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"--config {file} is not a merge_config.json of hf-epimer ({why})") from error


_KINDS: dict[str, type] = {
    "method": str,
    "options": dict,
    "base": str,
    "models": list,
    "fisher": list,
    "tasks": list,
    "weights": list,
}


def _check_kinds(content: Any) -> None:
    """Refuse what no recipe has been written as; the values of options and flags are checked where they are used.

    Raises:
        ValueError: saying which key is at fault.
    """
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    for name, kind in _KINDS.items():
        value = content.get(name)
        is_absent = name not in content or (name == "weights" and value is None)
        if not is_absent and not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    for name in ("models", "fisher", "tasks"):
        if not all(isinstance(text, str) for text in content.get(name, ())):
            raise ValueError(f"{name} is no list of strings")


_OPTIONS_BEFORE: dict[str, dict[str, Any]] = {name: {"normalize": "none"} for name in ("fisher", "gradient-matching")}
"""Options that a method got after 0.1, at what it did without them."""


def _today(method: str, options: Mapping[str, Any]) -> str:
    """What a method of an older recipe is called now: until 0.1, `epimer-core` was what has a scaffold."""
    return "kronecker-core" if method == "epimer-core" and "scaffold" in options else method
