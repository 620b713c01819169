"""``mech accelerate`` and ``mech sparsify``: how few heads can see everything, and learning to need fewer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

SPARSIFY = (
    "[bold]mech sparsify -m reference:qwen-long -d pages --pictures 6 --window 64 --out sparse[/]\n\n"
    "[bold]mech sparsify --pictures 6 --pictures 32 --window 64 --out sparse[/]  the lengths that will be served\n\n"
    "[bold]mech sparsify -m FOLDER --data mine.jsonl --at-most 0.1 --rank 16 --out sparse[/]"
)
EPILOG = (
    "[bold]mech accelerate -m reference:llava-m --share 0.02 --share 0.1[/]\n\n"
    "[bold]mech accelerate -m reference:qwen-long --pictures 32 --out frontier.html[/]  more pages, and a figure"
)

Pictures = Annotated[
    list[int] | None,
    typer.Option(
        help="Pages or frames per generated sample, for long-context models; repeatable, for several lengths.",
        callback=options.whole(1),
    ),
]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens a local head sees. Default: slightly more than the question.", callback=options.whole(1)),
]
Sinks = Annotated[int, typer.Option(help="First tokens, which every head sees.", callback=options.whole(0))]


@dataclass(frozen=True)
class Local:
    """Samples of long contexts, and what local heads see of them."""

    domain: options.Domain = None
    pictures: Pictures = None
    window: Window = None
    sinks: Sinks = 4

    def samples(self, run: options.Run, n: int) -> tuple[Any, str]:
        """The samples that the options ask for, at most ``n``, alternating between lengths; and their name."""
        import mech
        from mech.data.samples import Samples

        if not self.pictures:
            return run.samples(self.domain or ("pages" if run.data is None else None), n)
        if run.data is not None:
            raise ExperimentError(
                "--pictures with --data", "one of the two: it is for generated samples", "leave one out"
            )
        domain = self.domain or "pages"
        each = -(-n // len(self.pictures))
        drawn = [mech.haystacks(domain, each, run.seed, n_pictures=length) for length in self.pictures]
        samples = Samples([sample for turn in zip(*drawn, strict=True) for sample in turn][:n])
        return samples, f"{domain} of {' and '.join(map(str, self.pictures))} pictures"


@dataclass(frozen=True)
class Choices:
    """Which heads stay dense, and how many."""

    share: Annotated[
        list[float] | None,
        typer.Option(help="Share (below 1) or number of KV heads that stay dense; repeatable.", callback=options.size),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(options.CHOICES)}; repeatable. Default: all.", callback=options.among(options.CHOICES)
        ),
    ] = None
    n_random: options.NRandom = 4


def accelerate(
    run: options.Run,
    near: Local,
    dense: Choices,
    samples: Annotated[int, options.samples("A quarter ranks the heads, the rest test them.", 16)] = 96,
    margin: Annotated[
        float,
        typer.Option(help="The largest accuracy loss allowed for a recommended setting.", callback=options.share),
    ] = 0.1,
    batch_size: options.BatchSize = 8,
    out: options.PictureOrData = None,
) -> None:
    """Keep a few heads dense and the others local: accuracy, speed and cache, against other choices at equal budget."""
    import mech
    from mech.experiments.findings.acceleration import sentences, summarise
    from mech.results import save
    from mech.sparse.frontier.acceleration import CHOICES, SHARES

    sizes = [options.share_or_number(size) for size in dense.share or SHARES]
    some, called = near.samples(run, samples)
    find, test = some.split(0.25, run.seed)
    hooked = run.open_model()
    with run.progress() as say:
        result = mech.acceleration(
            hooked, test, find=find, window=near.window, sinks=near.sinks, choices=dense.choice or CHOICES,
            shares=sizes, n_random=dense.n_random, batch_size=batch_size, seed=run.seed, progress=say,
        )  # fmt: skip
    if out is not None and out.suffix == ".nc":
        save(result, out)
    elif out is not None:
        mech.view(result, margin=margin).save(out)
    facts = summarise(result, margin)
    if run.as_json:
        print(json.dumps(facts))
        return
    local = f"the others see {facts['sinks']} + {facts['window']} of {facts['length']} tokens"
    whole, alone = facts["dense"]["mean"], facts["window_only"]["accuracy"]["mean"]
    title = f"{hooked.name} on {called}: dense {whole:.1%}, window alone {alone:.1%} ({len(test)} samples; {local})"
    columns = ("KV heads dense", "chosen by", "accuracy", "loss in points (95%)", "attention work", "cache")
    options.print_table(title, columns, [_row(entry) for entry in facts["curve"]])
    options.tell(*(text for _, text, _ in sentences(facts)))


@dataclass(frozen=True)
class LongRun(options.Run):
    """The same, by default on the reference model with the longest contexts."""

    model: options.Model = "reference:qwen-long"


@dataclass(frozen=True)
class Training:
    """How few dense heads to aim for, and how to train for them."""

    target: Annotated[
        float,
        typer.Option(help="The largest divergence from the dense model, in nats per token.", callback=options.positive),
    ] = 0.02
    at_most: Annotated[
        float | None,
        typer.Option(help="Share (below 1) or number of KV heads that may stay dense.", callback=options.size),
    ] = None
    rank: Annotated[int, typer.Option(help="Rank of the adapter; 0 trains gates alone.", callback=options.whole(0))] = 8
    steps: Annotated[int, typer.Option(help="Training steps.", callback=options.whole(1))] = 120
    batch_size: options.BatchSize = 4


def sparsify(
    run: LongRun,
    near: Local,
    training: Training,
    samples: Annotated[int, options.samples("Half of them train, the rest test.", 4)] = 48,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for policy.json and the adapter (PEFT's format).")
    ] = None,
) -> None:
    """Learn which KV heads can be local, with an adapter that makes up for it: a head policy for ``localize``."""
    import mech
    from mech.experiments.metrics import ask, quiz
    from mech.experiments.statistics import accuracy_interval
    from mech.files import make_folder
    from mech.sparse.frontier.acceleration import local_for

    if out is not None:
        make_folder(out)  # before anything is trained
    some, called = near.samples(run, samples)
    train, test = some.split(0.5, run.seed)
    hooked = run.open_model()
    local = local_for(hooked, some, sinks=near.sinks, window=near.window)
    most = None if training.at_most is None else options.share_or_number(training.at_most)
    with run.progress() as say:
        found = mech.sparsify(
            hooked, train, sinks=local.sinks, window=local.window, target=training.target, at_most=most,
            rank=training.rank, steps=training.steps, batch_size=training.batch_size, seed=run.seed,
            progress=lambda done, total: say("steps", done, total),
        )  # fmt: skip
    questions = quiz(hooked, test, training.batch_size)
    dense = ask(hooked, questions)["accuracy"]
    with found.serve(hooked) as fast:
        served = ask(fast, questions)["accuracy"]
    length = max(int(batch.tensors["attention_mask"].sum(1).max()) for batch in questions.batches)
    cache = found.policy.budgets(hooked.cfg, length).kv_bytes
    if out is not None:
        found.save(out)
    lost = accuracy_interval((dense - served)[None]).as_dict()
    facts = {"n_kv_heads": found.n_kv_heads, "nats": found.loss, "dense": float(dense.mean()),
             "served": float(served.mean()), "lost": lost, "n_test": len(test), "kv_bytes": cache, "length": length,
             "policy": found.policy.to_json()}  # fmt: skip
    if run.as_json:
        print(json.dumps(facts))
        return
    kept, of = found.n_kv_heads
    title = f"{hooked.name} on {called}: {kept} of {of} KV heads stay dense ({local.sinks} + {local.window} tokens)"
    interval = " to ".join(f"{100 * lost[end]:.1f}" for end in ("low", "high"))
    row = (f"{dense.mean():.1%}", f"{served.mean():.1%}", f"{100 * lost['mean']:.1f} ({interval})", f"{cache:.0%}")
    options.print_table(title, ("dense", "served", f"loss in points (95%), {len(test)} samples", "cache"), [row])


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    loss = [f"{100 * entry['loss'][end] + 0.0:.1f}" for end in ("mean", "low", "high")]
    sets = f" (mean of {entry['draws']})" if entry["draws"] > 1 else ""
    return (
        f"{entry['n_kv_heads']} ({entry['share']:.0%})", entry["choice"] + sets, f"{entry['accuracy']['mean']:.1%}",
        f"{loss[0]} ({loss[1]} to {loss[2]})", f"{entry['flops']:.0%}", f"{entry['kv_bytes']:.0%}",
    )  # fmt: skip
