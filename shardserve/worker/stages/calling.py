"""One call of a Python stage's function: from instances to a result, or an error, for each of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardserve.errors import InvalidInput, ShardserveError, StageError, described, text_of
from shardserve.servable import PythonStage
from shardserve.worker.stages.values import Encoded, encode_values

logger = logging.getLogger(__name__)

Instance = tuple[Any, ...]
Outcome = Encoded | ShardserveError


@dataclass(frozen=True)
class StageCaller:
    """where: names method and stage in errors."""

    stage: PythonStage
    where: str

    def outcomes(self, instances: Sequence[Instance]) -> list[Outcome]:
        """One per instance. Of a batch that fails as a whole, by an exception or a wrong number of results, each
        instance runs again alone: only the one at fault fails, and no result is taken for another instance's."""
        try:
            return self._run(instances)
        except StageError as error:
            if len(instances) == 1:
                return [error]
        except ShardserveError as error:
            # The service, not an instance, is at fault (Model.call: Aborted, DeadlineExceeded, …).
            return [error] * len(instances)
        return [outcome for instance in instances for outcome in self.outcomes([instance])]

    def _run(self, instances: Sequence[Instance]) -> list[Outcome]:
        pid = os.getpid()
        try:
            results: list[Any]
            if self.stage.batch_size is None:
                # Whoever makes the batches gives such a function one instance at a time.
                (instance,) = instances
                results = [self.stage.function(*instance)]
            else:
                results = self._results(self.stage.function(list(instances)), len(instances))
        except BaseException as error:  # SystemExit and KeyboardInterrupt, too: signals don't raise here.
            if isinstance(error, ShardserveError) and not error.in_reply:
                raise
            logger.exception("%s raised", self.where)
            text = text_of(error) if isinstance(error, StageError) else f"{self.where}: {described(error)}"
            raise StageError(text) from error
        finally:
            if os.getpid() != pid:
                # The function forked, and this is the child: it would go on as if it were the stage's process, on its
                # connection.
                logger.error("%s: a process that it forked came back from the function; it is ended", self.where)
                os._exit(1)
        return [self._outputs(result) for result in results]

    def _results(self, returned: Any, count: int) -> list[Any]:
        one_each = "a list, tuple or generator with one result per instance is needed"
        if not isinstance(returned, list | tuple | Iterator) and not (
            isinstance(returned, np.ndarray) and returned.ndim
        ):
            raise StageError(f"{self.where}: returned {_kind(returned)} for {count} instances; {one_each}")
        results: list[Any] = []
        # Not list(returned): a generator may have no end.
        for result in returned:
            if len(results) == count:
                raise StageError(f"{self.where}: gave more than {count} results for {count} instances; {one_each}")
            results.append(result)
        if len(results) != count:
            raise StageError(f"{self.where}: gave {len(results)} results for {count} instances; {one_each}")
        return results

    def _outputs(self, result: Any) -> Outcome:
        outputs = tuple(result) if isinstance(result, list | tuple) else (result,)
        wanted = self.stage.outputs_count
        if len(outputs) != wanted:
            return StageError(f"{self.where}: gave {len(outputs)} outputs for an instance; outputs_count={wanted}")
        try:
            return encode_values(outputs, "output")
        except InvalidInput as error:
            return StageError(f"{self.where}: {error}")


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
