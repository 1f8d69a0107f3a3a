"""A shard's graph compiled for real, by g++: the same answers, errors and collectives as eager."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.export import Dim

from shardserve.agent import compile_shard
from shardserve.agent.compilation import (
    Compilation,
    CompilationError,
    Manifest,
    cache_folder,
    described,
    library_name,
    manifest_name,
    read_manifest,
)
from shardserve.export import export
from shardserve.export.verification.threads import ThreadGroup
from shardserve.shards import regions
from shardserve.shards.program import Program
from tests.models.lookup import RANKS, LookupLayers, export_lookup

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# A C++ compiler takes its time, and has the cores last.
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")]


class Block(LookupLayers):
    """A lookup that may raise, between two collectives."""

    def forward(self, x, ids):
        return self.layers(x), self.head(self.table(ids))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return export_lookup(Block, tmp_path_factory.mktemp("block"))


# What takes the C++ compiler long and changes nothing that is looked at here: trying out what the CPU can, and
# optimizing the wrapper around the kernels.
QUICK = {
    "cpp.vec_isa_ok": True,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "compile_threads": 1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(shards, cache):
    """Rank 0's program is compiled, rank 1's is not yet. As an agent's compiler does, but in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return [prepared(shards[0]), Program.load(shards[1])]


def prepared(shard):
    program = Program.load(shard)
    folder = cache_folder(program.config.graph_sha256, 1)
    if not (folder / manifest_name(frozenset())).exists():
        with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(QUICK):
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
            compile_shard.write(shard, shard.with_name("group_config.json"), folder, frozenset())
    compilation = Compilation(program, str(shard), None, 1)
    program.compiled = compilation.choose
    compilation.prepare(frozenset())
    return program


def step(programs, rows, ids=None):
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    ids = torch.arange(rows) % 10 if ids is None else ids
    group = ThreadGroup(RANKS)
    dims = {"rows": rows}

    def run(collective):
        program = programs[collective.rank]
        try:
            return program.run(dims, [x, ids], collective)
        except IndexError as error:
            return [str(error), *program.drain(dims, collective), len(collective.given)]

    return group.run(run)


@needs_compiler
@pytest.mark.parametrize("rows", [2, 3, 7, 64])
def test_same_answers(shards, compiled, rows):
    assert compiled[0].compiled((rows,)) is not None
    eager = step([Program.load(shard) for shard in shards], rows)
    for mine, theirs in zip(step(compiled, rows), eager, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_an_exception_between_two_collectives(shards, compiled):
    """As eager: the same error, and the rest of the collectives with zeros."""
    wrong = torch.tensor([1, 99, 2])
    eager = step([Program.load(shard) for shard in shards], 3, wrong)
    results = step(compiled, 3, wrong)
    for mine, theirs in zip(results, eager, strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], torch.zeros(3, 8))
        assert torch.equal(mine[2], torch.zeros(3, 8))
        assert mine[3] == theirs[3] == compiled[0].collective_count
    assert compiled[0].collective_count == 2


class Normalized(nn.Module):
    """What a normalization gives of columns lies otherwise in memory than what it gives without data.
    Compiled, `2 ** integers` ends the process, and what float16 can't hold would be held between two operators.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        columns = x.transpose(1, 2)
        powers = 2 ** (x > 0.5).long() + 1
        halves = x.half() * 70000 * 0.001
        return self.norm(columns).tanh() * 2 + 1, columns.flip(2).tanh() * 2 + 1, powers, halves


class Powers(nn.Module):
    def forward(self, x):
        return 2 ** (x + 1)


@needs_compiler
def test_code_that_gives_another_dtype_is_not_used(tmp_path, monkeypatch):
    """Of a graph whose compiled code gives float32 for integers, were it not kept out of the regions."""
    export(Powers(), (torch.arange(4),), name="net", out=tmp_path)
    shard = tmp_path / "device0" / "net.graph.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(regions, "_MISCOMPILED", frozenset())
    with pytest.raises(NotImplementedError, match=r"gives torch.float32\[4\] instead of torch.int64\[4\]: "):
        prepared(shard)


@needs_compiler
def test_what_operators_give_may_lie_otherwise_in_memory_than_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shapes = ({0: Dim("batch", max=16), 1: Dim("length", max=64)},)
    export(Normalized().eval(), (torch.randn(2, 8, 3),), name="net", out=tmp_path, dynamic_shapes=shapes)
    shard = tmp_path / "device0" / "net.graph.json"
    compiled, eager = prepared(shard), Program.load(shard)
    assert compiled.compiled((4, 9)) is not None

    def run(collective):
        given = torch.arange(108.0).reshape(4, 9, 3) / 100
        return [program.run({"batch": 4, "length": 9}, [given], collective) for program in (compiled, eager)]

    [(mine, theirs)] = ThreadGroup(1).run(run)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_the_variant_that_a_step_asks_for_is_wanted_once(shards):
    program = Program.load(shards[0])
    compilation = Compilation(program, str(shards[0]), None, 1)
    assert compilation.choose((1,)) is None
    assert compilation._wanted.get_nowait() == {"rows"}
    assert compilation.choose((1,)) is None
    assert compilation._wanted.empty()
    assert compilation.choose((0,)) is None


def test_conditions_that_do_not_hold(shards):
    program = Program.load(shards[0])
    compilation = Compilation(program, str(shards[0]), None, 1)
    compilation._ready[frozenset()] = program._forward, Manifest((), ("rows % 2 == 0", "rows < 50"), (), ())
    assert compilation.choose((4,)) is program._forward
    assert compilation.choose((5,)) is None
    assert compilation.choose((50,)) is None


def test_a_variant_is_named_by_its_file_and_sizes():
    assert described("m/net.graph.json", ("batch", "n"), frozenset({"n"})) == "m/net.graph.json with batch >= 2, n = 1"
    assert described("m/net.graph.json", (), frozenset()) == "m/net.graph.json"


def test_a_compilation_that_fails_is_a_warning_and_what_it_leaves_goes_with_the_next(
    shards, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho left > "$TMPDIR/left.s"\nexit 1\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    scratch = tmp_path / "shardserve/compiled/scratch"
    scratch.mkdir(0o700, parents=True)
    for folder in (scratch.parent, scratch.parent.parent):
        folder.chmod(0o700)
    (scratch / "of_one_that_was_killed").mkdir()
    program = Program.load(shards[0])
    compilation = Compilation(program, str(shards[0]), None, 1)
    program.compiled = compilation.choose
    compilation.prepare(frozenset())
    assert "rank 0: steps stay eager: the compiler of" in caplog.text
    assert "more in" in caplog.text
    assert program.compiled((3,)) is None
    assert (scratch / "left.s").exists()
    assert not (scratch / "of_one_that_was_killed").exists()


@pytest.fixture
def compiling_again(compiled, cache, shards, tmp_path, monkeypatch):
    """Of rank 0: a copy of its folder of the cache, and a Compilation whose compiler puts there what it gave before."""
    program = Program.load(shards[0])
    kept = cache_folder(program.config.graph_sha256, 1, {"XDG_CACHE_HOME": str(cache)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder(program.config.graph_sha256, 1)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho again >> {tmp_path}/ran\nexec cp -r {kept}/. "$5"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    compilation = Compilation(program, str(shards[0]), None, 1)
    program.compiled = compilation.choose
    return folder, compilation, program


@needs_compiler
@pytest.mark.parametrize("size", [None, 0, 3000])
@pytest.mark.parametrize("what", ["manifest.json", "*.so"])
def test_what_is_damaged_is_compiled_anew(compiling_again, tmp_path, caplog, what, size):
    """Missing, empty or shortened: a library of the last kind would end by SIGBUS whoever loads it."""
    folder, compilation, program = compiling_again
    (folder / "leftover.cpp").touch()
    for damaged in folder.glob(what):
        damaged.unlink() if size is None else os.truncate(damaged, min(size, damaged.stat().st_size // 2))
    compilation.prepare(frozenset())
    assert (tmp_path / "ran").read_text() == "again\n"
    assert program.compiled((3,)) is not None
    if (what, size) == ("manifest.json", None):
        assert not caplog.text
    else:
        (said,) = caplog.messages
        assert said.startswith(f"rank 0: is compiled anew: {folder}/")
        assert not (folder / "leftover.cpp").exists()


@needs_compiler
def test_what_is_whole_is_not_compiled_again(compiling_again, tmp_path):
    _, compilation, program = compiling_again
    compilation.prepare(frozenset())
    assert program.compiled((3,)) is not None
    assert not (tmp_path / "ran").exists()


@needs_compiler
def test_what_another_release_compiled_is_not_used(compiling_again, tmp_path, shards, monkeypatch, caplog):
    _, compilation, program = compiling_again
    monkeypatch.setattr(regions, "COMPILED", regions.COMPILED - {"layer_norm"})
    # The compiler, too, is another release: it was installed since this process began.
    compilation.prepare(frozenset())
    assert (tmp_path / "ran").read_text() == "again\n"
    anew, eager = caplog.messages
    assert anew.startswith("rank 0: is compiled anew: ")
    assert eager.startswith("rank 0: steps stay eager: ")
    assert anew.endswith("manifest.json: is of another release")
    assert eager.endswith("manifest.json: is of another release")
    wanted = step([Program.load(shard) for shard in shards], 3)
    torch.testing.assert_close(step([program, Program.load(shards[1])], 3), wanted)


@needs_compiler
def test_a_library_that_can_not_be_loaded_is_a_line_that_names_it(compiling_again, caplog):
    folder, compilation, program = compiling_again
    wrong = folder / "wrong"
    wrong.write_text("no library")
    wrong = wrong.rename(folder / library_name(wrong))
    manifest = read_manifest(folder / "manifest.json")
    libraries = (wrong.name,) * len(manifest.libraries)
    (folder / "manifest.json").write_bytes(msgspec.structs.replace(manifest, libraries=libraries).encode())
    compilation.prepare(frozenset())
    (record,) = caplog.records
    assert record.getMessage().startswith(f"rank 0: steps stay eager: {wrong} can't be loaded: ")
    assert "\n" not in record.getMessage()
    assert record.exc_info is None
    assert program.compiled((3,)) is None


def test_no_compiler_is_a_warning(shards, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    program = Program.load(shards[0])
    Compilation(program, str(shards[0]), None, 1).start()
    assert "needs the C++ compiler no-such-compiler; install g++" in caplog.text
    assert program.compiled is None


def test_the_cache_is_private(tmp_path):
    folder = cache_folder("ab" * 32, 1, {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert folder.parent == tmp_path / "cache/shardserve/compiled"
    assert folder.name.startswith("ab" * 16 + f"-torch{torch.__version__}-")
    for made in (folder, folder.parent, folder.parent.parent):
        assert made.stat().st_mode & 0o777 == 0o700
    assert folder == cache_folder("ab" * 32, 1, {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert folder != cache_folder("ab" * 32, 2, {"XDG_CACHE_HOME": str(tmp_path / "cache")})


@pytest.mark.parametrize("part", ["shardserve", "shardserve/compiled"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(tmp_path, part, mode):
    cache_folder("ab" * 32, 1, {"XDG_CACHE_HOME": str(tmp_path)})
    (tmp_path / part).chmod(mode)
    with pytest.raises(CompilationError, match=rf"{part} has to be a directory that this user owns"):
        cache_folder("ab" * 32, 1, {"XDG_CACHE_HOME": str(tmp_path)})


def test_a_cache_that_is_a_link_or_of_another_user_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shardserve").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CompilationError, match="has to be a directory"):
        cache_folder("ab" * 32, 1, {"XDG_CACHE_HOME": str(tmp_path)})
    if os.geteuid() == 0:
        (tmp_path / "shardserve").unlink()
        (tmp_path / "shardserve").mkdir()
        os.chown(tmp_path / "shardserve", 12345, 12345)
        with pytest.raises(CompilationError, match="this user owns"):
            cache_folder("ab" * 32, 1, {"XDG_CACHE_HOME": str(tmp_path)})


@needs_compiler
def test_the_compiler_ends_with_its_agent(shards, tmp_path):
    """Also when that is killed, and with the C++ compiler that it runs."""
    script = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-m', 'shardserve.agent.compile_shard', *sys.argv[1:],"
        " str(os.getpid())], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    # A C++ compiler that says when it runs, and doesn't end.
    reached = tmp_path / "reached"
    os.mkfifo(reached)
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\necho $$ > {reached}\nexec sleep 60\n")
    compiler.chmod(0o700)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    config = str(Path(shards[0]).with_name("group_config.json"))
    agent = subprocess.Popen(
        [sys.executable, "-c", script, str(shards[0]), config, str(tmp_path), "1", ""],
        stdout=subprocess.PIPE,
        env=environment,
    )
    child = psutil.Process(int(agent.stdout.readline()))
    deepest = psutil.Process(int(reached.read_text()))
    assert os.sched_getscheduler(deepest.pid) == os.SCHED_IDLE
    os.kill(agent.pid, signal.SIGKILL)
    agent.wait()
    agent.stdout.close()
    gone, alive = psutil.wait_procs([child, deepest], timeout=30)
    assert not alive, gone
    assert not (tmp_path / manifest_name(frozenset())).exists()
