"""Where each Hugging Face parameter lives in an engine's model, whose layers fuse some of them (qkv, gate and up)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spear_fast.errors import EngineError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Place:
    """Rows `start : start + rows` of the engine's parameter `target`, or all of it if `rows` is None."""

    target: str
    start: int = 0
    rows: int | None = None
    padded: bool = False
    """The rows after it only fill up the vocabulary and stay 0."""


class WeightLayout:
    """Writes and reads the parameters of an engine's model by their Hugging Face names, without copies in between.

    The map is read off the model: `packed_modules_mapping`, `hf_to_vllm_mapper` and the sizes. The first value of each
    parameter goes in by the model's own `load_weights` and must then be found where the map says; a parameter that
    is not (the engine permutes or scales it) keeps using `load_weights` and is listed in `unreadable`.

    Example: `layout = WeightLayout.of(model, shapes)`; `layout.begin()`; `layout.write("model.norm.weight", tensor)`;
    `layout.missing()` is what has not been written since `begin`.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, _Place]) -> None:
        """Use `WeightLayout.of`."""
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._load: Callable[[Iterable[tuple[str, Tensor]]], Any] | None = getattr(model, "load_weights", None)
        self._shapes = dict(shapes)
        self._places = dict(places)
        self._copies: dict[str, str] = {}
        """Heads with a storage of their own that repeat another parameter: name in the engine -> name written."""
        self._unproven = set(places) if self._load is not None else set()
        self._transformed: set[str] = set()
        self._missing = set(shapes)

    @classmethod
    def of(cls, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> WeightLayout:
        """Map the parameters of an engine's model.

        Args:
            model: The model as the engine runs it, unsharded (tensor parallel size 1).
            shapes: Shape of every parameter that will be written, by Hugging Face name; a tied head is left out.

        Raises:
            EngineError: A shape does not fit, the engine ties what the trainer does not, or holds a parameter that
                none of the names would ever write.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        places: dict[str, _Place] = {}
        for name, shape in shapes.items():
            place = _find(model, parameters, shapes, name)
            if place is not None:
                _check_shape(name, shape, place, parameters[place.target])
                places[name] = place
        layout = cls(model, shapes, places)
        if len(places) < len(shapes) and layout._load is None:
            raise EngineError(f"the engine's {type(model).__name__} has no parameter {min(layout.unreadable)!r}")
        layout._check_overlap()
        layout._account_for_the_rest(model)
        return layout

    @property
    def unreadable(self) -> frozenset[str]:
        """Names that only the engine's own loader can write, so `read` and digests leave them out."""
        return frozenset(self._shapes.keys() - self._places.keys() | self._transformed)

    @property
    def readable(self) -> tuple[str, ...]:
        """Names that `read` takes: all others, and heads that repeat the embedding in a storage of their own."""
        own = tuple(name for name in self._places if name not in self._transformed)
        return own + tuple(copy for copy, source in self._copies.items() if source not in self._transformed)

    def begin(self) -> None:
        """Expect every parameter again."""
        self._missing = set(self._shapes)

    def missing(self) -> set[str]:
        """Names not written since `begin`."""
        return set(self._missing)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor) -> None:
        """Copy a whole parameter into the engine, from any device and floating-point type.

        Raises:
            EngineError: The name is unknown, the shape is another one than the engine was built for, or there is no
                place for it and the engine's own loader does not take it either.
        """
        shape = self._shapes.get(name)
        if shape is None or tuple(tensor.shape) != tuple(shape):
            known = "the engine was built without it" if shape is None else f"the engine was built for {tuple(shape)}"
            raise EngineError(f"got weights {name!r} of shape {tuple(tensor.shape)}, but {known}")
        if name in self._unproven or name in self._transformed or name not in self._places:
            self._write_by_loader(name, tensor)
        else:
            self.read(name).copy_(tensor)
        self._complete(name)
        self._missing.discard(name)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Return the engine's storage of a parameter as a view in Hugging Face shape.

        Raises:
            EngineError: `name` is not among `readable`.
        """
        source = self._copies.get(name, name)
        place = self._places.get(source)
        if place is None or source in self._transformed:
            raise EngineError(f"the values of {name!r} cannot be read back from this engine")
        whole = self._parameters[name if name in self._copies else place.target].detach()
        return whole if place.rows is None else whole[place.start : place.start + place.rows]

    def _write_by_loader(self, name: str, tensor: Tensor) -> None:
        """Write by the engine's own code; the first time, compare what arrived where the map says."""
        if self._load is None:
            raise EngineError(f"the engine's model has no loader for {name!r}")
        try:
            loaded = self._load([(name, tensor)])
        except Exception as error:
            raise EngineError(f"the engine's own loader refuses {name!r}: {type(error).__name__}: {error}") from error
        if loaded is not None and not loaded:
            raise EngineError(
                f"the engine's own loader ignores {name!r}, so it would be left as it is; use engine.name=hf"
            )
        if name in self._unproven:
            self._unproven.discard(name)
            held = self.read(name)
            if not torch.equal(_bits(held), _bits(tensor.to(held.device, held.dtype))):
                self._transformed.add(name)

    def _complete(self, name: str) -> None:
        """Zero the rows that pad a vocabulary, and repeat the value in a head that does not share its storage."""
        place = self._places.get(name)
        if place is None:
            return
        if place.padded:
            self._parameters[place.target].detach()[place.rows :].zero_()
        for copy, source in self._copies.items():
            if source == name:
                self._parameters[copy].detach().copy_(self._parameters[place.target].detach())

    def _check_overlap(self) -> None:
        owners: dict[tuple[int, int], str] = {}
        for name, place in self._places.items():
            owner = owners.setdefault((id(self._parameters[place.target]), place.start), name)
            if owner != name:
                raise EngineError(
                    f"the engine keeps one value for {owner!r} and {name!r}, which the trainer has two of; set "
                    "tie_word_embeddings of the model's config as the trainer's, or use another engine"
                )

    def _account_for_the_rest(self, model: nn.Module) -> None:
        """Find a source for what no name writes: a head repeats the embedding; anything else would never be set."""
        covered = {id(self._parameters[place.target]) for place in self._places.values()}
        for target, parameter in self._parameters.items():
            if id(parameter) in covered or parameter.numel() <= 1:
                continue
            source = next((name for name, place in self._places.items() if self._repeats(model, target, place)), None)
            if source is not None:
                self._copies[target] = source
            elif not self.unreadable:
                raise EngineError(
                    f"no parameter of the trainer goes to the engine's {target!r} {tuple(parameter.shape)}; it would "
                    "keep the values that it started with"
                )

    def _repeats(self, model: nn.Module, target: str, place: _Place) -> bool:
        """Whether `target` is the head of the vocabulary whose embedding is at `place`."""
        head, embedding = _owner(model, target), _owner(model, place.target)
        size = getattr(embedding, "org_vocab_size", None)
        return (
            size is not None
            and size == getattr(head, "org_vocab_size", None)
            and self._parameters[target].shape == self._parameters[place.target].shape
        )


def _find(
    model: nn.Module, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str
) -> _Place | None:
    """Where the parameter goes, None if the map does not tell."""
    mapped = _mapped(model, name)
    steps = name.split(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        part = next((part for part in parts if part in steps), None)
        if part is None:
            continue
        # The model's map of names may fuse already, depending on the version of vLLM.
        target = ".".join(fused if step == part else step for step in mapped.split("."))
        siblings = [".".join(other if step == part else step for step in steps) for other in parts]
        if target in parameters:
            if any(sibling not in shapes for sibling in siblings):
                return None
            heights = [shapes[sibling][0] for sibling in siblings]
            if sum(heights) != parameters[target].shape[0]:
                raise EngineError(
                    f"{siblings} have {heights} rows, {sum(heights)} together, but the engine's {target!r} is "
                    f"{tuple(parameters[target].shape)}"
                )
            position = parts.index(part)
            return _Place(target, sum(heights[:position]), heights[position])
    if mapped not in parameters:
        return None
    vocabulary = getattr(_owner(model, mapped), "org_vocab_size", None)
    if vocabulary in (None, parameters[mapped].shape[0]):
        return _Place(mapped)
    return _Place(mapped, rows=vocabulary, padded=True)


def _mapped(model: nn.Module, name: str) -> str:
    """The engine's name of a checkpoint's parameter, before fusion or after."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    names = mapper.apply_list([name]) if mapper is not None else []
    return names[0] if names else name


def _check_shape(name: str, shape: tuple[int, ...], place: _Place, target: Tensor) -> None:
    """Raise EngineError unless the place has the shape."""
    have = tuple(target.shape) if place.rows is None else (place.rows, *target.shape[1:])
    if have != tuple(shape):
        raise EngineError(
            f"weights {name!r} have shape {tuple(shape)}, but the engine holds {have} in {place.target!r} of "
            f"{tuple(target.shape)}; build the engine from the config of the model that is trained"
        )


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])
