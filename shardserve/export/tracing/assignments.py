"""Buffers in whose places a forward puts other tensors (`self.buffer = …`)."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.utils.hooks import RemovableHandle

from shardserve.errors import ExportError


class Assignments:
    """Inside it, while torch.export runs the model, those of inner modules are noted.

    torch.export keeps an assignment as the buffer's next value only where the outermost module makes it
    (register_buffer_assignment_hook in torch/_functorch/_aot_autograd/utils.py, torch 2.13). Elsewhere the graph would
    read the first value for ever, without a word.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._noted: list[tuple[nn.Module, str]] = []
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Assignments:
        self._hook = register_module_buffer_registration_hook(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._hook is not None
        self._hook.remove()

    def _note(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        # What an operator has written in place comes back as the same object.
        if module is not self._model and module._buffers.get(name) is not value:
            self._noted.append((module, name))

    def check(self, program: ExportedProgram) -> None:
        """ExportError for one whose former value the forward has read. What is assigned before it is read is no state
        (some rotary embeddings keep their frequencies so)."""
        inputs = zip(program.graph_signature.input_specs, program.graph.nodes, strict=False)
        read = {spec.target for spec, node in inputs if spec.kind is InputKind.BUFFER and node.users}
        for path, module in self._model.named_modules(remove_duplicate=False):
            for name in (name for owner, name in self._noted if owner is module):
                if f"{path}.{name}" in read:
                    raise ExportError(
                        f"the model assigns its buffer '{path}.{name}', and torch.export forgets what an inner module "
                        f"assigns: write into the buffer instead, self.{name}.copy_(…)"
                    )
