"""Serving scripts, each in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap

import psutil

SERVABLE = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1)

@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
"""

LOCAL = """
from shardserve.server import register

model = register.declare_model("net.graph.json", "shardserve")

@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
"""


def write_servable(directory, text=SERVABLE, ranks=2, name="net"):
    (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / name / "servable_config.py").write_text(text)
    devices = [{"device_id": str(r), "device_ip": "a", "rank_id": str(r)} for r in range(ranks)]
    table = {"server_count": "1", "server_list": [{"server_id": "127.0.0.1", "device": devices}]}
    (directory / "ranks.json").write_text(json.dumps(table))


class Script:
    """`with`; `line` is the next that it prints, `end` its exit code and what it wrote to stderr. launched_by: a
    command that execs the rest of its line."""

    def __init__(self, directory, text, launched_by=(), stdin=None, **environment):
        file = directory / "serve.py"
        file.write_text(
            "from shardserve import server\nfrom shardserve.server import distributed\n" + textwrap.dedent(text)
        )
        self.process = subprocess.Popen(
            [*launched_by, sys.executable, str(file)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def line(self):
        return self.process.stdout.readline().strip()

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, timeout=60):
        """It has to end by itself, with all that it started."""
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = self.children()
        _, stderr = self.process.communicate(timeout=timeout)
        _, left = psutil.wait_procs(children, timeout=30)
        assert not left
        return self.process.returncode, stderr
