"""A function on several ranks at once, each in a process of its own."""

import os
import signal
import traceback


def run_processes(context, function, size, *arguments, seconds=60):
    """`function(rank, *arguments)` for each rank; what one raises fails the test. context: of multiprocessing."""
    processes = []
    for rank in range(size):
        read, write = context.Pipe(duplex=False)
        process = context.Process(target=_live, args=(function, rank, arguments, seconds, write))
        process.start()
        write.close()
        processes.append((process, read))
    errors = []
    for process, read in processes:
        errors.append(read.recv())
        process.join()
        process.close()
        read.close()
    assert errors == [""] * size, "".join(errors)


def _live(function, rank, arguments, seconds, pipe):
    signal.alarm(seconds)
    try:
        function(rank, *arguments)
        pipe.send("")
    except BaseException:  # noqa: BLE001 - the parent wants to know all
        pipe.send(traceback.format_exc())
    # Not through the exit handlers, which are pytest's.
    os._exit(0)
