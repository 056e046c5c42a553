"""`deepwright run`: a target and Hydra overrides in, a finished run out."""

from __future__ import annotations

import os

import click

from .cli_plugins import block_option, load_plugins


@click.command(
    short_help="Run the pipeline or a stage of it.",
    epilog="""\b
Examples:
  deepwright run pipeline
  deepwright run pipeline experiment=smoke seed=1
  deepwright run rl rl.lr=1e-4 paths.root=/data/runs
  deepwright run sft model.init=imported
  deepwright run rl model.init=imported finetune=lora finetune.rank=16
  deepwright run pretrain -m model/attention=mla,gqa seed=0,1,2
  deepwright run pipeline --config runs/history/20260101-120000-pipeline/config.yaml

Overrides are Hydra's: key=value changes, group=option chooses, +key=value adds, ~key removes.
Press Ctrl-C at any time; the same command goes on where it stopped.""",
)
@click.argument("target")
@click.argument("overrides", nargs=-1)
@click.option("-m", "--multirun", is_flag=True, help="Run every combination of a=1,2 / choice() / range() / glob().")
@click.option("--cfg", is_flag=True, help="Show the composed and checked configuration as YAML, and stop.")
@click.option("--config", "config_file", default="", metavar="FILE", help="Run a resolved configuration again.")
@click.option("--force-stage", multiple=True, metavar="NAME", help="Do a finished stage again. Repeatable.")
@block_option
def run(
    target: str,
    overrides: tuple[str, ...],
    multirun: bool,
    cfg: bool,
    config_file: str,
    force_stage: tuple[str, ...],
    block: tuple[str, ...],
) -> None:
    """Run TARGET: `pipeline`, or one stage with what it needs (prepare, pretrain, sft, rl, distill, serve).

    Finished stages are reused; interrupted ones go on from their last checkpoint.
    """
    plugins = load_plugins(block)

    from . import compose, request

    wanted = list(overrides)
    if force_stage:
        wanted.append(f"run.force=[{','.join(force_stage)}]")
    jobs = compose.sweep(wanted, plugins) if multirun else [wanted]
    # Every job is checked before the first one starts.
    requests = [request.make(target, job, plugins, config_file) for job in jobs]
    if cfg:
        click.echo("---\n".join(compose.to_yaml(dict(r.composed)) for r in requests), nl=False)
        return
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    from . import invoke
    from .stopping import terminated_as_exception

    for number, (job, checked) in enumerate(zip(jobs, requests, strict=True), 1):
        if len(jobs) > 1:
            click.echo(f"Run {number} of {len(jobs)}: {' '.join(job)}", err=True)
        with terminated_as_exception():
            invoke.invoke(checked, plugins, config_file)
