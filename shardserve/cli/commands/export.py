"""`shardserve export`: cuts a model into the shards of all ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardserve.cli.codes import WrongUsage
from shardserve.cli.options import values
from shardserve.cli.options.inputs import load_arrays
from shardserve.cli.progress import shown_progress
from shardserve.cli.quiet import quiet_torch
from shardserve.cli.source import read_source
from shardserve.errors import ExportError, InvalidInput, ShardserveError
from shardserve.shards.config import FILE_NAME

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from shardserve.export import Plan, Report, Subgraph, VerifyResult
    from shardserve.progress import Progress

DEFAULT_TOLERANCE = 1e-4
NOT_GIVEN = 0

EXAMPLE = """SOURCE is one of
  package.module:function, importable from the current directory. The function takes no arguments and returns
    (model, args) or (model, args, options): a torch.nn.Module, a tuple of example inputs, and a dict with any of
    kwargs, dynamic_shapes (as torch.export takes them), input_names, output_names, plan, weights: safetensors
    files to take the parameters from, which then need no memory, and subgraphs, instead of an example: a dict of
    shardserve.export.Subgraph, each written to DIR/its name;
  a folder in the Hugging Face layout: config.json and safetensors; needs the transformers package, fetches nothing;
  a .pt2 file of torch.export.save. Loading one runs what is in it, as importing a module does: only your own.

examples:
  shardserve export net:example --name transformer --out model --tp 2 --pp 2 --plan plan.json --verify
  shardserve export net:example --name transformer --ranks 8 --memory-per-device 16GiB --meta
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="cut a model into the shards of all ranks",
        description="Cuts a PyTorch model into tensor- and pipeline-parallel shards, in one process, without devices.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="module:function, a Hugging Face folder or FILE.pt2; see below"
    )
    parser.add_argument(
        "--name", required=True, type=_name, metavar="NAME", help="names the graph files: NAME.graph.json"
    )
    parser.add_argument("--out", type=_folder, metavar="DIR", help="write DIR/device0, DIR/device1, … (no default)")
    for option, meaning in (("--tp", "tensor-parallel ranks of a pipeline stage"), ("--pp", "pipeline stages")):
        parser.add_argument(
            option,
            type=values.count_or_auto,
            default=NOT_GIVEN,
            metavar="N|auto",
            help=f"{meaning} (default 1; with --ranks auto)",
        )
    _add_plan_arguments(parser)
    _add_verify_arguments(parser)
    parser.set_defaults(run=run)


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is cut, and into how many ranks."""
    parser.add_argument(
        "--plan",
        metavar="FILE|auto|tp_plan",
        help="JSON: how parameters are sharded, where stages begin; auto finds it, tp_plan is a Hugging Face model's "
        "(default: the function's options['plan'], or else auto)",
    )
    parser.add_argument(
        "--save-plan", metavar="FILE", help="write the plan that was used, to edit and give again (default: don't)"
    )
    parser.add_argument(
        "--cut",
        action="append",
        default=[],
        metavar="MODULE",
        help="the module that begins the next stage; once per stage after the first (default: balance the stages)",
    )
    parser.add_argument(
        "--ranks",
        type=values.count,
        metavar="N",
        help="choose --tp and --pp where they aren't given: the fastest layout of at most N ranks by the cost model "
        "(default: they are 1)",
    )
    parser.add_argument(
        "--memory-per-device",
        type=values.memory,
        metavar="SIZE",
        help="with --ranks: only layouts whose ranks fit into as much, parameters and a step's tensors (16GiB, 500MB; "
        "default: any)",
    )
    parser.add_argument(
        "--meta", action="store_true", help="plan and report only: needs no values of parameters, writes nothing"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if the plan of several --tp ranks shards no parameter"
    )


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the shards back and compare with the whole model; subgraphs that keep buffers in their order, too",
    )
    parser.add_argument(
        "--inputs",
        type=values.path,
        metavar="FILE.npz",
        help="inputs for --verify, an array of each input's name (default: the example's)",
    )
    for option in ("--atol", "--rtol"):
        parser.add_argument(
            option,
            type=values.not_negative,
            default=DEFAULT_TOLERANCE,
            metavar="X",
            help=f"the {'absolute' if option == '--atol' else 'relative'} tolerance of --verify (default %(default)g)",
        )


def run(args: argparse.Namespace) -> int:
    """Export, and verify if asked to; 0, or 1 with the reason on stderr."""
    try:
        return _export(args)
    except ShardserveError as error:
        print(f"shardserve export: {error}", file=sys.stderr)
        return 1


def _export(args: argparse.Namespace) -> int:
    _check_usage(args)
    if args.save_plan is not None:
        values.check_folder(Path(args.save_plan))
    with shown_progress() as progress:
        progress("loading the model", 0, 1)
        model, example, options = read_source(args.source, args.meta)
        from shardserve.export import Subgraph  # importing torch takes seconds: not before it is needed

        inputs = _inputs(args.inputs) if args.inputs else None
        options["plan"] = _plan(args.plan, options.get("plan"), model)
        with quiet_torch():
            if "subgraphs" in options:
                subgraphs, reports = _export_subgraphs(args, model, example, options, progress)
            else:
                subgraphs = {"": Subgraph(example, options.get("kwargs") or {}, options.get("dynamic_shapes"))}
                reports = [_export_one(args, model, example, options, inputs, progress)]
    print(*reports, sep="\n", flush=True)
    if args.save_plan is not None:
        reports[0].plan.save(args.save_plan)
    if not args.verify:
        return 0
    failed = [_verify(args, model, name, subgraph, inputs) for name, subgraph in subgraphs.items()]
    if len(subgraphs) > 1:
        failed.append(_verify_chain(args, model, subgraphs))
    return max(failed)


def _export_one(
    args: argparse.Namespace,
    model: Any,
    example: tuple[Any, ...],
    options: dict[str, Any],
    inputs: Mapping[str, Tensor] | None,
    progress: Progress,
) -> Report:
    from shardserve.export import export

    return export(model, example, **_given(args), inputs=inputs, progress=progress, **options)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are the command line's own, of `export` and of `export_subgraphs`."""
    return {
        "name": args.name,
        "out": None if args.meta else args.out,
        "tensor_parallel": args.tp,
        "pipeline_parallel": args.pp,
        "ranks": args.ranks,
        "memory_per_device": args.memory_per_device,
        "cuts": tuple(args.cut),
        "strict": args.strict,
    }


def _export_subgraphs(
    args: argparse.Namespace, model: Any, example: tuple[Any, ...], options: dict[str, Any], progress: Progress
) -> tuple[dict[str, Subgraph], list[Report]]:
    from shardserve.export import Subgraph, export_subgraphs

    subgraphs = options.pop("subgraphs")
    if not isinstance(subgraphs, Mapping) or not all(isinstance(value, Subgraph) for value in subgraphs.values()):
        raise ExportError(f"{args.source}: options['subgraphs'] must be a dict of shardserve.export.Subgraph")
    others = [option for option in options if option not in ("plan", "weights")]
    if example or others:
        what = f"options['{others[0]}']" if others else "an example"
        raise ExportError(f"{args.source}: gives {what} beside options['subgraphs'], which have their own")
    if args.inputs:
        raise ExportError("--inputs is for a model without subgraphs: each of them has inputs of its own")
    reports = export_subgraphs(model, subgraphs, **_given(args), progress=progress, **options)
    return dict(subgraphs), list(reports.values())


def _verify(
    args: argparse.Namespace, model: Any, name: str, subgraph: Subgraph, inputs: Mapping[str, Tensor] | None
) -> int:
    """name: of the subgraph, "" of one that isn't among several."""
    from shardserve.export import verify
    from shardserve.export.subgraphs import calling

    with shown_progress() as progress, calling(model, subgraph.method):
        result = verify(
            model,
            subgraph.args,
            subgraph.kwargs,
            args.out / name,
            args.name,
            atol=args.atol,
            rtol=args.rtol,
            progress=progress,
            inputs=inputs,
            dynamic_shapes=subgraph.dynamic_shapes,
        )
    _print_result(args, result, _hint(model), f"subgraph {name}: " if name else "", "output ")
    return 0 if result.passed else 1


def _verify_chain(args: argparse.Namespace, model: Any, subgraphs: Mapping[str, Subgraph]) -> int:
    from shardserve.export import verify_chain

    with shown_progress() as progress:
        result = verify_chain(model, subgraphs, args.out, args.name, args.atol, args.rtol, progress)
    if result is None:
        return 0
    _print_result(args, result, _hint(model), "subgraphs in order: ")
    return 0 if result.passed else 1


def _print_result(args: argparse.Namespace, result: VerifyResult, hint: str, which: str, kind: str = "") -> None:
    """hint: on tolerances; kind: what the results' outputs are, if their names don't say it."""
    print(f"{which}compared at {values.counted(len(result.sizes), 'size')} of the inputs")
    for note in result.notes:
        print(f"{which}{note}")
    for output in result.outputs:
        relative = f"max relative error {output.max_relative:.3g}"
        print(f"{kind}{output.name}: max abs error {output.max_abs:.3g} with {output.where}, {relative}")
    print(f"max abs error: {result.max_abs_error:.3g}", flush=True)
    if result.parting:
        print(
            f"shardserve export: {which}the shards differ from the model by more than atol {args.atol:g}, "
            f"rtol {args.rtol:g}; the largest difference is in {result.worst}; {result.parting}{hint}",
            file=sys.stderr,
        )
    for said in result.uncompared:
        print(f"shardserve export: {which}{said}", file=sys.stderr)


def _hint(model: Module) -> str:
    """What to try of a model whose values have 8 or 11 bits, of which other orders of summation change the last."""
    kinds = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in model.parameters()
        if tensor.is_floating_point() and tensor.dtype.itemsize == 2
    }
    return f"; a model in {' and '.join(sorted(kinds))} needs more, as --atol 0.05 --rtol 0.05" if kinds else ""


def _inputs(file: Path) -> dict[str, Tensor]:
    """The tensors of --inputs."""
    import numpy as np
    import torch

    found: dict[str, Tensor] = {}
    for name, array in load_arrays(file).items():
        if array.dtype == np.dtype("V2"):  # numpy has no bfloat16 of its own, and stores that as bytes
            found[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            continue
        try:
            found[name] = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{file}: '{name}', {array.dtype}, can't be a tensor: {error}") from error
    return found


def _check_usage(args: argparse.Namespace) -> None:
    """Options that only go together; those that aren't given get their values."""
    if args.out is None and not args.meta:
        raise WrongUsage("--out DIR says where to write; --meta writes nothing")
    if args.meta and args.verify:
        raise WrongUsage("--verify reads what is written, and --meta writes nothing")
    if args.inputs and not args.verify:
        raise WrongUsage("--inputs is for --verify, which isn't given")
    for option in ("tp", "pp"):
        if getattr(args, option) == NOT_GIVEN:
            setattr(args, option, 1 if args.ranks is None else None)
        elif getattr(args, option) is None and args.ranks is None:
            raise WrongUsage(f"--{option} auto needs --ranks N, to choose among their layouts")
    if args.memory_per_device is not None and args.ranks is None:
        raise WrongUsage("--memory-per-device needs --ranks N, to choose among their layouts")


def _name(text: str) -> str:
    if not FILE_NAME.match(text):
        raise argparse.ArgumentTypeError(f"{text!r} isn't made of letters, digits, '_', '-' and '.', to name a file")
    return text


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder; '.' is the current one")
    return Path(text)


def _plan(chosen: str | None, given: Any, model: Any) -> Plan | None:
    """The plan of --plan, else the one that the function gave; None, as auto, where neither is."""
    from shardserve.export import Plan

    given = given if chosen is None else chosen
    if given is None or isinstance(given, Plan):
        return given
    if given == "auto":
        return Plan(auto=True)
    if given == "tp_plan":
        return Plan.from_tp_plan(model)
    return Plan.load(given) if isinstance(given, (str, Path)) else Plan.from_dict(given)
