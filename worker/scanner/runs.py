"""One run of the plain model, with what every component wrote and how attention was called.

What sweeps replace values in, and what gradients are taken through: recorded with gradients enabled, a
run keeps its graph.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from worker.scanner.hooks import tensor_in, tensor_out
from worker.scanner.loading import LoadedModel
from worker.scanner.sites import BlockModules

__all__ = ("AttentionCall", "Run", "embedded", "record")

_CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""What the families call the cache that attention hands its keys and values to."""


class AttentionCall(NamedTuple):
    """How the model called a layer's attention, so that it can be called again with other residuals."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    """Without the hidden states."""
    cache_argument: str | None
    """The name of the cache's argument; None where attention takes no cache."""
    keys: Float[Tensor, "batch kv_head pos d_head"] | None
    values: Float[Tensor, "batch kv_head pos d_head"] | None
    """As attention reads them, rotated; None where it takes no cache."""

    def row(self, row: int) -> "AttentionCall":
        """The call as it would have been for one prompt of the batch."""
        kwargs, mask = self.kwargs, self.kwargs.get("attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": mask[row % len(mask)].unsqueeze(0)}
        return self._replace(
            kwargs=kwargs,
            keys=None if self.keys is None else self.keys[row : row + 1],
            values=None if self.values is None else self.values[row : row + 1],
        )

    def detached(self) -> "AttentionCall":
        """The same call without the graph of its keys and values."""
        return self._replace(
            keys=None if self.keys is None else self.keys.detach(),
            values=None if self.values is None else self.values.detach(),
        )


class Run(NamedTuple):
    """A run of one prompt, or of a batch of equal length. Tuples have an entry a layer."""

    ids: Int[Tensor, "batch pos"]
    resid_pre: tuple[Float[Tensor, "batch pos d_model"], ...]
    z: tuple[Float[Tensor, "batch pos heads_by_d_head"], ...]
    """Every head's mix before W_O, side by side."""
    attn: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp: tuple[Float[Tensor, "batch pos d_model"], ...]
    """What the sublayers wrote to the residual stream."""
    attn_reads: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp_reads: tuple[Float[Tensor, "batch pos d_model"], ...]
    """The residual as each sublayer reads it: in a graph, a branch of its own."""
    final: Float[Tensor, "batch pos d_model"]
    """The residual that the final norm reads."""
    logits: Float[Tensor, "batch d_vocab"]
    """After the last position."""
    calls: tuple[AttentionCall, ...]

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt."""
        return self.final.shape[1]

    def row(self, row: int) -> "Run":
        """The run of one prompt of the batch."""
        run = self._each(lambda value: value[row : row + 1])
        return run._replace(calls=tuple(call.row(row) for call in self.calls))

    def detached(self) -> "Run":
        """The same values without their graph."""
        run = self._each(lambda value: value.detach())
        return run._replace(calls=tuple(call.detached() for call in self.calls))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Run":
        def layers(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(change(value) for value in values)

        return self._replace(
            ids=change(self.ids),
            resid_pre=layers(self.resid_pre),
            z=layers(self.z),
            attn=layers(self.attn),
            mlp=layers(self.mlp),
            attn_reads=layers(self.attn_reads),
            mlp_reads=layers(self.mlp_reads),
            final=change(self.final),
            logits=change(self.logits),
        )


class _KeepsKeysAndValues:
    """Stands where a cache would, empty as it would be, and keeps what passes."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Recorder:
    """The lists that hooks fill, in the order in which the model runs."""

    def __init__(self, on_layer: Callable[[int], None] | None) -> None:
        self.values: dict[str, list[Tensor]] = {
            name: [] for name in ("resid_pre", "z", "attn", "mlp", "attn_reads", "mlp_reads")
        }
        self.calls: list[tuple[AttentionCall, _KeepsKeysAndValues]] = []
        self.final: Tensor | None = None
        self._on_layer = on_layer

    def hooks(self, block: BlockModules) -> Iterator[Any]:
        """Register what is needed in one block."""
        yield block.block.register_forward_pre_hook(self._enter)
        yield block.attn.register_forward_pre_hook(self._call_attention, with_kwargs=True)
        yield block.w_o.register_forward_pre_hook(partial(self._keep_input, "z"))
        yield block.attn_write.register_forward_hook(partial(self._keep_output, "attn"))
        yield block.mlp_write.register_forward_hook(partial(self._keep_output, "mlp"))
        for name, norm, sublayer in (
            ("attn_reads", block.attn_norm, block.attn),
            ("mlp_reads", block.mlp_norm, block.mlp),
        ):
            normed = not isinstance(norm, nn.Identity)
            if name == "mlp_reads" and normed and norm is block.attn_norm:
                # Its branch must begin before the norm, which attention's has gone through by now.
                branch = partial(self._branch_through, name, norm)
                yield sublayer.register_forward_pre_hook(branch, with_kwargs=True)
                continue
            reads = norm if normed else sublayer
            yield reads.register_forward_pre_hook(partial(self._branch, name), with_kwargs=True)
        yield block.block.register_forward_hook(self._leave)

    def end(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.final = tensor_in(args)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.values["resid_pre"].append(tensor_in(args))

    def _leave(self, *_: Any) -> None:
        if self._on_layer is not None:
            self._on_layer(len(self.values["resid_pre"]) - 1)

    def _keep_input(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.values[name].append(tensor_in(args))

    def _keep_output(self, name: str, _m: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.values[name].append(tensor_out(output))

    def _branch(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _given(args, kwargs, self._begin(name, args[0] if args else kwargs["hidden_states"]))

    def _branch_through(
        self,
        name: str,
        norm: nn.Module,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        branch = self._begin(name, self.values["resid_pre"][-1])
        # Its `forward` alone: hooks on the norm are about what attention reads.
        return _given(args, kwargs, norm.forward(branch))

    def _begin(self, name: str, read: Tensor) -> Tensor:
        # The residual goes on past the sublayer; a view of it goes only there.
        branch = read.view_as(read)
        self.values[name].append(branch)
        return branch

    def _call_attention(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        cache_argument = next((name for name in _CACHE_ARGUMENTS if name in kwargs), None)
        call = AttentionCall(args[1:], others, cache_argument, None, None)
        keeper = _KeepsKeysAndValues()
        self.calls.append((call, keeper))
        return args, kwargs if cache_argument is None else {**kwargs, cache_argument: keeper}


def _given(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden_states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module that is to read something else."""
    if args:
        return (hidden_states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_states}


def _side_by_side(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The prompts' last positions lie apart; so given, W_U would be read once for each of them.
    return (tensor_in(args).contiguous(), *args[1:])


@contextmanager
def _recording(model: LoadedModel, recorder: _Recorder) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for block in model.modules.blocks:
            handles += recorder.hooks(block)
        handles.append(model.modules.final_norm.register_forward_pre_hook(recorder.end))
        handles.append(model.modules.unembed.register_forward_pre_hook(_side_by_side))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _embedding(model: LoadedModel, given: Tensor | None) -> Iterator[None]:
    """Read `given` instead of the token embeddings."""
    if given is None:
        yield
        return
    handle = model.modules.embed.register_forward_hook(lambda *_: given)
    try:
        yield
    finally:
        handle.remove()


def record(
    model: LoadedModel,
    ids: Int[Tensor, "batch pos"],
    *,
    embeddings: Float[Tensor, "batch pos d_model"] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Run:
    """Run the plain twin once and keep what its components wrote.

    Args:
        model: The model; it is as it was afterwards, whatever happened.
        ids: The prompt.
        embeddings: Token embeddings to read instead of the prompt's own.
        on_layer: Called after each block; may raise to stop.
    """
    recorder = _Recorder(on_layer)
    with _recording(model, recorder), _embedding(model, embeddings):
        logits = model.plain(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    if recorder.final is None:
        raise RuntimeError(f"{type(model.plain).__name__} did not run its final norm")
    return Run(
        ids=ids,
        **{name: tuple(values) for name, values in recorder.values.items()},
        final=recorder.final,
        logits=logits,
        calls=tuple(
            call._replace(keys=keeper.keys, values=keeper.values) for call, keeper in recorder.calls
        ),
    )


def embedded(
    model: LoadedModel, ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The token embeddings of a prompt; learned positions are added to them later."""
    embeddings: Tensor = model.modules.embed(ids)
    return embeddings
