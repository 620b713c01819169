"""Two ways to patch paths: ``Walk`` over the rows of the path, and ``literal``. ``path_patching`` chooses one.

Both do the same two runs for a sender and a receiver. The *path run* is the base run with the sender's output from the
source run; frozen parts keep their base values, the rest is recomputed, and the receiver's input is recorded. The
*receiving run* is the base run with that input in place and everything after it recomputed. If the receiver is the
logits, there is only the path run.

With attention and MLPs frozen, what a sender adds to the stream reaches every receiver unchanged. ``Walk`` then
computes it once and adds it to the base run's stream before each receiver (if a layer scales the stream, it walks
through the layers instead).

``literal`` runs the whole model for each path. ``Walk`` continues from a cached run (``mech.model.partial``). With
attention frozen, nothing moves between positions on the way, so the path run of all senders is one growing batch of the
few rows that sender and receiver have in common, and no attention is computed. The first row of that batch is the base
run itself, from which the values of frozen parts are read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mech.experiments.paths.ends import Node, Part
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of, module_at
from mech.model.eager import uncompiled
from mech.model.named.norms import frozen_norm
from mech.model.partial.continuation import Continuation
from mech.model.partial.room import fitting
from mech.model.points import point_name

Hooks = list[tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]]
CARRIED = 2**25  # how many numbers are kept of what senders add to one example's stream
Score = Callable[[Float[Tensor, "variant read vocab"]], Float[Tensor, " variant"]]


def norms_of(model: HookedMLLM) -> list[nn.Module]:
    """The norms that read the residual stream or lie between a part and the stream, including the final norm."""
    stack, found = model.family.text, [module_at(model.hf_model, model.family.final_norm)]
    for layer, block in enumerate(layers_of(model.hf_model, stack)):
        found.append(model.norm(layer))
        # If there is no norm between attention and MLP, both read the output of one norm (Cohere).
        found += [module_at(block, path) for path in (stack.mid, stack.attn_out, stack.mlp_out) if path]
    return list({id(norm): norm for norm in found}.values())


@contextmanager
def frozen_norms(norms: Iterable[nn.Module], held: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Within this context norms keep the scale they have at ``held``; missing entries are read off the first row.

    Replaces their ``forward``: a hook would run after the hooks that write a norm's output (Gemma's post-norms).
    """
    own = {norm: (norm.forward, vars(norm).get("forward")) for norm in norms}

    def linear(norm: nn.Module, stream: Tensor) -> Tensor:
        plain, at = own[norm][0], held.setdefault(norm, stream[:1].detach())
        change = stream - at
        # Rows of padding may be zero, and a norm has no scale there.
        return plain(at) + torch.where(change == 0, 0, frozen_norm(plain, at)(change))

    try:
        for norm in own:
            norm.forward = partial(linear, norm)
        yield
    finally:
        for norm, (_, replaced) in own.items():
            if replaced is None:
                del norm.forward
            else:
                norm.forward = replaced


@dataclass(eq=False)
class Walk:
    """The paths of one example.

    Attributes:
        row: this example in the run that is patched into.
        source: the senders' outputs in the other run, ``[1 ...]``, by the full name of their point.
        example: which row of the parts' position masks this example is.
        freeze: what keeps its value between the ends: "attention", "mlp", "norm".
        score: the metric of variants, from their logits.
        before: the metric of the base run.
    """

    row: Continuation
    source: Mapping[str, Tensor]
    example: int
    freeze: frozenset[str]
    score: Score
    before: Tensor
    _norms: list[nn.Module] = field(init=False, repr=False)
    _added: dict[Node, tuple[Tensor, Tensor]] = field(init=False, repr=False)  # rows, and what is added there

    def __post_init__(self):
        self._norms = norms_of(self.row.model) if "norm" in self.freeze else []
        self._added = {}

    @torch.no_grad()
    def scores(self, senders: Sequence[Part], receivers: Sequence[Part]) -> Float[Tensor, "sender receiver"]:
        """The metric with each path patched. Memory: as much as there is room for, or two variants.

        Raises:
            ExperimentError: not even two variants fit into memory. If fewer fit than usual, there is one warning.
        """
        found = self.before.repeat(len(senders), len(receivers))
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for s, sender in enumerate(senders):
            for r, receiver in enumerate(receivers):
                if sender.reaches(receiver) and (rows := self._rows(sender, receiver)):
                    groups.setdefault(rows, []).append((s, r))
        for rows, pairs in groups.items():
            chosen = sorted({s for s, _ in pairs}, key=lambda s: senders[s].layer)
            columns = sorted({r for _, r in pairs})
            places = torch.tensor(rows, device=self.row.reads.device)
            ends = [receivers[r] for r in columns]

            def run(part: Sequence[int], ends: list[Part] = ends, places: Tensor = places) -> list[Tensor]:
                return self._of_paths([senders[s] for s in part], ends, places)

            step = max(1, self.row.kept.room.held // len(rows) - 1)
            for start in range(0, len(chosen), step):
                for part, values in fitting(self.row.kept.room, chosen[start : start + step], run):
                    for r, of_senders in zip(columns, values, strict=True):
                        for s, value in zip(part, of_senders, strict=True):
                            if (s, r) in pairs:
                                found[s, r] = value
        return found

    def _of_paths(self, senders: Sequence[Part], receivers: Sequence[Part], rows: Tensor) -> list[Tensor]:
        """For each receiver, the metric with its path from every sender patched."""
        seen, stream = self._path_run(senders, receivers, rows)
        found = []
        for receiver in receivers:
            if receiver.nodes[0].kind == "logits":
                assert stream is not None
                found.append(self._read(stream, rows))
            else:
                found.append(self._receiving_runs(receiver, seen, len(senders), rows))
        return found

    def _rows(self, sender: Part, receiver: Part) -> tuple[int, ...]:
        """The positions that the path run computes; none if nothing from the sender reaches the receiver."""
        sent = sender.where[self.example].nonzero()[:, 0]
        if not len(sent):
            return ()
        first, stop = self.row.span(int(sent[0]))
        if "attention" not in self.freeze:
            return tuple(range(first, stop)) if sent[0] < stop else ()
        reads = receiver.nodes[0].kind == "logits"
        meet = self.row.reads.cpu() if reads else receiver.where[self.example].nonzero()[:, 0]
        return tuple(int(p) for p in sent[torch.isin(sent, meet) & (sent < stop)])

    def _path_run(
        self, senders: Sequence[Part], receivers: Sequence[Part], rows: Int[Tensor, " row"]
    ) -> tuple[dict[Node, Tensor], Tensor | None]:
        """What every receiving node reads, by sender, and the stream after the last layer if the logits read it.

        The senders are ordered by layer. The first row is the base run.
        """
        row, layers = self.row, len(self.row)
        nodes = {node for receiver in receivers for node in receiver.nodes}
        if all(len(sender.nodes) == 1 for sender in senders) and self._unchanged:
            return self._direct_run(senders, nodes, rows)
        end = max(node.layer for node in nodes)
        seen: dict[Node, Tensor] = {}
        keys = "z" if "attention" in self.freeze else "own"
        x = row.stream(senders[0].layer)[None, rows]
        for layer in range(senders[0].layer, min(end + 1, layers)):
            born = sum(sender.layer <= layer for sender in senders)
            x = torch.cat((x, x[:1].expand(born + 1 - len(x), -1, -1)))
            if layer == 0:
                self._embed(x, senders[:born], rows)
            hooks = self._path_hooks(layer, senders[:born], rows, nodes, seen)
            with frozen_norms(self._norms, {}):
                x = row.run(layer, x, rows, keys=keys, hooks=hooks)
        return _for_all(seen, len(senders)), x if end == layers else None

    @cached_property
    def _unchanged(self) -> bool:
        """Whether everything is frozen and every layer then passes on unchanged what was added to the stream."""
        if not {"attention", "mlp"} <= self.freeze:
            return False
        row, rows = self.row, self.row.reads[-1:]
        for layer in range(len(row)):
            x = row.stream(layer)[None, rows].repeat(2, 1, 1)
            x[1] += x[0].flip(-1)
            out = row.run(layer, x, rows, keys="z", hooks=self._path_hooks(layer, [], rows, set(), {}))
            change = (out[1] - out[0]) - (x[1] - x[0])
            if change.abs().max() > 32 * torch.finfo(x.dtype).eps * out.abs().max():
                return False
        return True

    def _direct_run(
        self, senders: Sequence[Part], nodes: set[Node], rows: Int[Tensor, " row"]
    ) -> tuple[dict[Node, Tensor], Tensor | None]:
        """``_path_run`` for single senders if ``_unchanged``."""
        row, added, seen = self.row, self._carried(senders, rows), {}
        from_layer = torch.tensor([s.layer - (s.nodes[0].kind == "embed") for s in senders], device=rows.device)
        for layer in sorted({node.layer for node in nodes} - {len(row)}):
            here = {node for node in nodes if node.layer == layer}
            born = int((from_layer <= layer).sum())
            x = row.stream(layer)[None, rows].repeat(born + 1, 1, 1)
            x[1:] += torch.where((from_layer < layer)[:born, None, None].to(added.device), added[:born], 0)
            with frozen_norms(self._norms, {}):
                if Node("mlp", layer) in here:
                    row.run(layer, x, rows, keys="z", hooks=self._path_hooks(layer, senders[:born], rows, here, seen))
                else:
                    row.project(layer, x, rows, _recording(list(here), seen))
        stream = None
        if any(node.kind == "logits" for node in nodes):
            stream = row.stream(len(row))[None, rows].repeat(len(senders) + 1, 1, 1)
            stream[1:] += added
        return _for_all(seen, len(senders)), stream

    def _carried(self, senders: Sequence[Part], rows: Int[Tensor, " row"]) -> Float[Tensor, "sender row d_model"]:
        """What each of these single senders adds to the stream at its patched positions."""
        row, missing = self.row, {}
        for sender in senders:
            (node,) = sender.nodes
            if node.kind != "embed" and not torch.isin(rows, self._added.get(node, (rows[:0],))[0]).all():
                missing.setdefault(node.layer, {})[node] = None
        everywhere = torch.ones_like(senders[0].where)
        fresh = {}
        for layer, nodes in missing.items():
            x = row.stream(layer)[None, rows].expand(len(nodes) + 1, -1, -1)
            hooks = self._path_hooks(layer, [Part((node,), everywhere) for node in nodes], rows, set(), {})
            with frozen_norms(self._norms, {}):
                out = row.run(layer, x, rows, keys="z", hooks=hooks)
            fresh |= {node: (rows, change) for node, change in zip(nodes, out[1:] - out[:1], strict=True)}
        found = row.stream(0).new_zeros(len(senders), len(rows), row.stream(0).shape[-1])
        for change, sender in zip(found, senders, strict=True):
            (node,) = sender.nodes
            chosen = sender.where[self.example].to(rows.device)[rows]
            if node.kind == "embed":
                change[chosen] = self.source[node.point][0, rows[chosen]] - row.stream(0)[rows[chosen]]
            else:
                known, value = fresh.get(node) or self._added[node]
                change[chosen] = value[torch.searchsorted(known, rows[chosen])]
        if sum(value.numel() for _, value in [*self._added.values(), *fresh.values()]) <= CARRIED:
            self._added |= fresh
        return found

    def _embed(self, x: Tensor, senders: Sequence[Part], rows: Tensor) -> None:
        for variant, sender in enumerate(senders, 1):
            for node in sender.nodes:
                if node.kind == "embed":
                    chosen = sender.where[self.example].to(x.device)[rows]
                    x[variant, chosen] = self.source[node.point][0, rows[chosen]]

    def _path_hooks(
        self, layer: int, senders: Sequence[Part], rows: Tensor, receivers: set[Node], seen: dict[Node, Tensor]
    ) -> Hooks:
        """Hooks of one layer that write the senders' outputs, hold what is frozen, and record what receivers read."""
        sent: dict[str, list[tuple[int, Node, Tensor]]] = {}
        for variant, sender in enumerate(senders, 1):
            chosen = sender.where[self.example].to(rows.device)[rows]
            for node in sender.nodes:
                if node.layer == layer and node.kind != "embed":
                    sent.setdefault(node.kind, []).append((variant, node, chosen))

        def attention(z: Tensor, hook: HookPoint) -> Tensor:
            z = z.clone()
            for variant, node, chosen in sent["head"]:
                z[variant, chosen, node.index] = self.source[node.point][0, rows[chosen], node.index].to(z)
            return z

        def feed_forward(out: Tensor, hook: HookPoint) -> Tensor:
            if (here := Node("mlp", layer)) in receivers:
                seen[here] = out.clone()
            out = out[:1].repeat(len(out), 1, 1) if "mlp" in self.freeze else out.clone()
            for variant, node, chosen in sent.get("mlp", ()):
                out[variant, chosen] = self.source[node.point][0, rows[chosen]].to(out)
            return out

        hooks: Hooks = [(point_name("attn.hook_z", layer), attention)] if "head" in sent else []
        if "mlp" in sent or "mlp" in self.freeze or Node("mlp", layer) in receivers:
            hooks.append((point_name("hook_mlp_out", layer), feed_forward))
        return hooks + _recording([node for node in receivers if node.layer == layer], seen)

    def _read(self, stream: Float[Tensor, "variant row d_model"], rows: Tensor) -> Float[Tensor, " variant"]:
        """The metric of streams after the last layer; positions outside ``rows`` are as in the base run."""
        row = self.row
        behind = row.stream(len(row))[row.reads].repeat(len(stream), 1, 1)
        for place, read in enumerate(row.reads.tolist()):
            if len(at := (rows == read).nonzero()):
                behind[:, place] = stream[:, int(at)]
        with frozen_norms(self._norms, {}):
            return self.score(row.logits(behind)[1:])

    def _receiving_runs(
        self, receiver: Part, seen: Mapping[Node, Tensor], count: int, rows: Tensor
    ) -> Float[Tensor, " variant"]:
        """The metric when the receiver reads what was recorded on each path."""
        row, layer, last = self.row, receiver.layer, len(self.row) - 1
        kinds = {node.kind for node in receiver.nodes if node.layer == layer}
        # In this layer queries and MLPs change only their own rows; keys and values change later rows too.
        keys = "z" if kinds == {"mlp"} else "kept" if kinds <= {"q", "mlp"} else "own"
        at = receiver.where[self.example].to(rows.device)[rows].nonzero()[:, 0]
        if layer == last and keys != "own":
            at = at[torch.isin(rows[at], row.reads)]
        if not len(at):
            return self.before.repeat(count)
        changed = rows[at]
        first, stop = row.span(int(changed[0]))
        span = torch.arange(first, stop, device=rows.device)
        found = []
        for part in torch.arange(count).split(max(1, self.row.kept.room.held // len(span))):

            def hooks(layer: int, offset: Tensor, part: Tensor = part) -> Hooks:
                here = [node for node in receiver.nodes if node.layer == layer]
                return [_writing(node, seen[node][part][:, at], offset) for node in here]

            if keys == "own":
                x = row.stream(layer)[None, span].expand(len(part), -1, -1)
                written = hooks(layer, changed - first)
                alone = layer == last and kinds <= {"k", "v"}
                x = row.finish(x, span, written) if alone else row.run(layer, x, span, hooks=written)
            else:
                x = row.stream(layer)[None, changed].expand(len(part), -1, -1)
                own = row.run(layer, x, changed, keys=keys, hooks=hooks(layer, torch.arange(len(at))))
                x = row.stream(layer + 1)[None, span].repeat(len(part), 1, 1)
                x[:, changed - first] = own
            for above in range(layer + 1, last + 1):
                inside = hooks(above, changed - first)
                alone = above == last and not inside
                x = row.finish(x, span) if alone else row.run(above, x, span, hooks=inside)
            if x.shape[1] != len(row.reads):
                x = x[:, row.reads - first]
            found.append(self.score(row.logits(x)))
        return torch.cat(found)


def _for_all(seen: Mapping[Node, Tensor], count: int) -> dict[Node, Tensor]:
    """What receivers read, by sender; senders that come after a receiver leave its input unchanged."""
    return {node: torch.cat((v[1:], v[:1].expand(count + 1 - len(v), *v.shape[1:]))) for node, v in seen.items()}


def _recording(receivers: Sequence[Node], seen: dict[Node, Tensor]) -> Hooks:
    """Hooks that record queries, keys and values."""

    def hook_of(node: Node) -> Callable[[Tensor, HookPoint], None]:
        return lambda value, hook: seen.update({node: value[:, :, node.index].clone()})

    return [(node.point, hook_of(node)) for node in receivers if node.kind in ("q", "k", "v")]


def _writing(node: Node, values: Tensor, at: Tensor) -> tuple[str, Callable[[Tensor, HookPoint], Tensor]]:
    """A hook that writes recorded values at some rows of every variant."""

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        value[(slice(None), at) if node.kind == "mlp" else (slice(None), at, node.index)] = values.to(value)
        return value

    return node.point, write


@torch.no_grad()
def literal(
    model: HookedMLLM,
    base: Inputs,
    source: Mapping[str, Tensor],
    freeze: frozenset[str],
    senders: Sequence[Part],
    receivers: Sequence[Part],
    score: Callable[[Inputs], Float[Tensor, " batch"]],
) -> tuple[Float[Tensor, "batch sender receiver"], int]:
    """Every path by forwards of the whole model: one per sender, plus one for each of its receivers but the logits.

    Returns:
        The metrics, and how many forwards they took.
    """
    live, layers = set(model.points()), range(model.cfg.n_layers)
    # Freeze at z, so that a sending head can be patched in a frozen layer.
    points = [next(p for p in ("attn.hook_z", "hook_attn_out") if point_name(p, layer) in live) for layer in layers]
    held_names = [point_name(p, layer) for layer, p in enumerate(points)] if "attention" in freeze else []
    held_names += [point_name("hook_mlp_out", layer) for layer in layers] if "mlp" in freeze else []
    norms = norms_of(model) if "norm" in freeze else []
    scales: dict[nn.Module, Tensor] = {}
    handles = [
        norm.register_forward_pre_hook(lambda module, args: (scales.update({module: args[0]}), None)[1])
        for norm in norms
    ]
    held: dict[str, Tensor] = {}
    try:
        keep = [(name, lambda value, hook: held.update({hook.name: value.clone()})) for name in held_names]
        with uncompiled(), model.hooks(keep):
            before = score(base)
    finally:
        for handle in handles:
            handle.remove()
    nodes = {node for receiver in receivers for node in receiver.nodes}
    rows, forwards = [], 1
    for sender in senders:
        seen: dict[Node, Tensor] = {}
        with frozen_norms(norms, scales), model.hooks(_whole_path_hooks(sender, source, held, nodes, seen)):
            read = score(base)
        forwards += 1
        cells = []
        for receiver in receivers:
            if not sender.reaches(receiver):
                cells.append(before)
            elif receiver.nodes[0].kind == "logits":
                cells.append(read)
            else:
                with model.hooks([put(node, receiver.where, seen[node]) for node in receiver.nodes]):
                    cells.append(score(base))
                forwards += 1
        rows.append(torch.stack(cells, 1))
    return torch.stack(rows, 1), forwards


def _whole_path_hooks(
    sender: Part,
    source: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    receivers: set[Node],
    seen: dict[Node, Tensor],
) -> Hooks:
    """Hooks that record receivers, then hold what is frozen, then write the sender's output."""
    hooks = _recording(list(receivers), seen)
    hooks += [(node.point, lambda out, hook, node=node: seen.update({node: out.clone()}))
              for node in receivers if node.kind == "mlp"]  # fmt: skip
    hooks += [(name, lambda value, hook, kept=kept: kept) for name, kept in held.items()]
    for node in sender.nodes:
        mine = source[node.point]
        hooks.append(put(node, sender.where, mine[:, :, node.index] if node.kind == "head" else mine))
    return hooks


def put(node: Node, where: Tensor, values: Tensor) -> tuple[str, Callable[[Tensor, HookPoint], Tensor]]:
    """A hook that writes values at some positions of every row, for one head if the point has heads."""

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        mine = value[:, :, node.index] if value.ndim == 4 else value
        mine[where.to(value.device)] = values[where.to(values.device)].to(value)
        return value

    return node.point, write
