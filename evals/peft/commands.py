"""What the commands of the paper's tables take and say alike."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from evals.peft.runs import Diverged, Key, first_line
from outliermerge.errors import OutlierMergeError
from outliermerge.output.names import as_local
from outliermerge.storage.failures import naming


def arguments(text: str, *, model: str, output: str, micro_batch: int) -> argparse.ArgumentParser:
    """Return a parser with what both tables take."""
    parser = argparse.ArgumentParser(
        description=text.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--small", action="store_true", help="try it on a replica: seconds on a CPU, no hub")
    add("--model", default=model, help="an id of the hub, or a folder")
    add("--seeds", type=int, nargs="+", default=None, help="of order, adapters, noise, dropout")
    add("--rate", type=float, help="learning rate in place of the recipe's")
    add("--epochs", type=int, help="passes over the training data in place of the recipe's")
    add("--micro-batch", type=int, default=micro_batch, help="examples on the device at once")
    add("--device", default="auto", help="cpu, cuda or cuda:1; auto is cuda if there is one")
    add("--output", default=output, help="folder of records and the table")
    return parser


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, addresses, and --small with a model or data."""
    given = {"--epochs": options.epochs, "--micro-batch": options.micro_batch}
    for flag, value in given.items():
        if value is not None and value < 1:
            parser.error(f"{flag}: found {value}, expected 1 or more")
    if options.rate is not None and not 0 < options.rate < math.inf:
        parser.error(f"--rate: found {options.rate}, expected more than 0")
    if seeds := [seed for seed in options.seeds or () if not 0 <= seed < 1 << 32]:
        parser.error(f"--seeds: found {seeds[0]}, expected 0 to {(1 << 32) - 1}")
    try:
        options.output = as_local(options.output)
    except OutlierMergeError as error:
        parser.error(str(error))
    if options.small and (options.data or options.model != parser.get_default("model")):
        parser.error("--small makes its own model and data: leave out --model and --data")


def begin(
    options: argparse.Namespace, replica: Callable[[Path], tuple[str, str]], **lists: Any
) -> torch.device:
    """Fill in what the command line leaves out, and return the device.

    Args:
        replica: makes the model and the data of --small in a folder.
        lists: by option its value with --small, and its value without.
    """
    hush()
    device = device_of(options.device)
    if options.small:
        options.model, options.data = _replica(replica, options.output)
    for name, (small, whole) in lists.items():
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else whole)
    return device


def _replica(make: Callable[[Path], tuple[str, str]], output: Path) -> tuple[str, str]:
    """Make a replica in a folder, file by file: another process may be reading the same one."""
    folder = output / "replica"
    with naming(output, "written"):
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".replica", dir=output) as made:
            names = [Path(each).relative_to(made) for each in make(Path(made))]
            for path in filter(Path.is_file, Path(made).rglob("*")):
                target = folder / path.relative_to(made)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    model, data = (str(folder / name) for name in names)
    return model, data


def hush() -> None:
    """Let transformers and peft say nothing of their own but errors."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # peft asks transformers by a name that it has given up.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)


def device_of(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        OutlierMergeError: it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OutlierMergeError(f"--device {name}: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise OutlierMergeError(f"--device {name}: expected cpu, cuda or cuda:1")
    return device


def pretrained(kind: Any, model: str, **keys: Any) -> Any:
    """Return what a class of transformers makes of a model.

    Raises:
        OutlierMergeError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(model, **keys)
    except Exception as error:  # of several libraries, where a file is damaged
        said = f"--model {model}: {kind.__name__} cannot load it: {first_line(error)}"
        if isinstance(error, OSError) and not Path(model).is_dir():
            said += (
                f". Where the hub cannot be reached, run `hf download {model} --local-dir FOLDER` "
                "elsewhere, and give the folder as --model"
            )
        raise OutlierMergeError(said) from error


def make_runs(runs: Mapping[Key, Callable[[str], None]]) -> int:
    """Make runs one after the other; return 1 if some diverged, else 0.

    Args:
        runs: functions, which get a title for their progress.
    """
    failed = 0
    for number, (key, run) in enumerate(runs.items(), 1):
        try:
            run(f"{number}/{len(runs)} {', '.join(map(str, key))}")
        except Diverged as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
    return int(failed > 0)


def ended(work: Callable[[], int]) -> int:
    """Do the work of a command; return its exit code."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        text = f"{first_line(error)} Give a smaller --micro-batch"
    except (OutlierMergeError, OSError) as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        text = f"memory is too small: {first_line(error)}"
    except KeyboardInterrupt:
        text = "stopped; the same command goes on from the last checkpoint"
    print(f"error: {text}", file=sys.stderr)
    return 1
