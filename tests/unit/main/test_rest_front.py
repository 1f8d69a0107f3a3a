import asyncio
import time

import httpx
import numpy as np
from main_harness import Launcher, Worker, announce, attached, keep

from shardserve.main.router import MAX_STRINGS
from shardserve.wire.messages import front

METHODS = {
    "predict": front.MethodInfo(("x",), ("x",), {}),
    "wide": front.MethodInfo(("x",), ("x",), {"x": "int64"}),
}


def rest(test, max_mb=100):
    """Runs `test(launcher, worker, http)` with an attached echo Worker."""

    async def run():
        worker = Worker(greeting=announce(methods=METHODS))
        async with Launcher() as launcher:
            base = f"http://{await launcher.rest(max_mb)}"
            async with attached(launcher, worker), httpx.AsyncClient(base_url=base, timeout=20) as http:
                await test(launcher, worker, http)

    asyncio.run(run())


def test_one_instance_and_several():
    async def test(launcher, worker, http):
        for path in ("/model/echo:predict", "/model/echo/version/1:predict", "/model/echo/version/0:predict"):
            reply = await http.post(path, json={"instances": {"x": [[1, 2], [3, 4]]}})
            assert reply.status_code == 200
            assert reply.headers["content-type"] == "application/json"
            assert reply.json() == {"instances": [{"x": [[1, 2], [3, 4]]}]}
        reply = await http.post("/model/echo:predict", json={"instances": [{"x": "a"}, {"x": 1.5}]})
        assert reply.json() == {"instances": [{"x": "a"}, {"x": [1.5]}]}

    rest(test)


def test_the_signature_decides_the_dtype():
    async def test(launcher, worker, http):
        for method, dtype in (("predict", "int32"), ("wide", "int64")):
            assert (await http.post(f"/model/echo:{method}", json={"instances": {"x": [1]}})).status_code == 200
            assert (await worker.next(front.Infer)).instances[0]["x"].dtype == dtype

    rest(test)


def test_wrong_requests_have_their_status_and_a_text():
    async def test(launcher, worker, http):
        good = {"instances": {"x": 1}}
        for path, content, status, text in [
            ("/model/nobody:predict", good, 404, "no servable 'nobody' here"),
            ("/model/echo:nothing", good, 404, "has no method 'nothing'"),
            ("/model/echo/version/7:predict", good, 404, "has no version 7"),
            ("/model/echo/version/last:predict", good, 404, "version 'last' isn't a version number"),
            ("/model/echo/version/\u0661:predict", good, 404, "version '\u0661' isn't a version number"),
            (f"/model/echo/version/{10**22}:predict", good, 404, f"version '{10**22}' isn't a version number"),
            ("/model/echo/version/" + "9" * 90 + ":predict", good, 404, "9… (50 more characters left out)' isn't"),
            ("/model/echo", good, 404, "POST /model/echo isn't POST /model/{servable}"),
            ("/model/echo:predict", {"instances": []}, 400, "at least one instance"),
            ("/model/echo:predict", {"x": 1}, 400, "instances"),
            ("/model/echo:predict", {"instances": [{"x": 1}] * 4097}, 413, "at most 4096 instances"),
        ]:
            reply = await http.post(path, json=content)
            assert reply.status_code == status, reply.text
            assert text in reply.json()["error_msg"]
        assert (await http.get("/model/echo:predict")).status_code == 405
        squeezed = await http.post("/model/echo:predict", json=good, headers={"content-encoding": "gzip"})
        assert (squeezed.status_code, squeezed.json()["error_msg"]) == (
            400,
            "header content-encoding: 'gzip' isn't taken, bodies are plain JSON",
        )
        assert (
            await http.post("/model/echo:predict", json=good, headers={"content-encoding": "identity"})
        ).status_code == 200
        assert (await http.post("/model/echo:predict", content=b"{")).status_code == 400
        twice = await http.post("/model/echo:predict", content=b'{"instances": {"x": 1, "x": 2}}')
        assert (twice.status_code, twice.json()["error_msg"]) == (400, "the body has an object with the key 'x' twice")

    rest(test)


def test_the_timeout_is_plain_digits():
    async def test(launcher, worker, http):
        content = {"instances": {"x": 1}}

        async def post(timeout):
            reply = await http.post("/model/echo:predict", json=content, headers={"X-Request-Timeout": timeout})
            return reply.status_code, reply.json()

        for right in ("10", "10.5", "10.", "0010", "1" + "0" * 300):
            assert (await post(right))[0] == 200, right
        wrong = ["soon", "", "1_0", "1e1", "inf", "Infinity", "nan", "-1", "+1", "0", "0.0", ".", "1 0", "1,5", "0x1"]
        for timeout in (*wrong, "\xb2".encode("latin-1"), "\u0661".encode(), "1" + "0" * 400):
            status, body = await post(timeout)
            assert status == 400, timeout
            assert body["error_msg"].startswith("header x-request-timeout: "), timeout
            assert body["error_msg"].endswith("isn't a number of seconds over 0, as in 30 or 0.5")

    rest(test)


def test_instances_that_all_fail_have_their_errors_in_their_places():
    async def test(launcher, worker, http):
        for instances, texts in [
            ({"x": [[1], 2]}, ["instances.x[1]: a ragged array"]),
            ({"z": 1}, ["missing 'x' and unknown 'z'"]),
            ([{"z": 1}, {"x": None}, 3], ["instance 0: missing", "instances[1].x: neither", "instances[2] isn't"]),
        ]:
            reply = await http.post("/model/echo:predict", json={"instances": instances})
            assert reply.status_code == 400
            results = reply.json()["instances"]
            for result, text in zip(results, texts, strict=True):
                assert list(result) == ["error_msg"]
                assert text in result["error_msg"]

    rest(test)


def test_instances_fail_alone():
    def script(worker, message, payload):
        failed = front.InstanceError("StepError", "id 9 is out of range")
        results = [front.InstanceOutputs({}), *[failed] * (len(message.instances) - 1)]
        worker.send(front.Reply(message.request, results if len(results) > 1 else [failed]))

    async def test(launcher, worker, http):
        worker.script = script
        reply = await http.post("/model/echo:predict", json={"instances": [{"x": 1}, {"z": 1}, {"x": 2}]})
        assert reply.status_code == 200
        first, second, third = reply.json()["instances"]
        assert first == {}
        assert "unknown 'z'" in second["error_msg"]
        assert third == {"error_msg": "id 9 is out of range"}
        reply = await http.post("/model/echo:predict", json={"instances": {"x": 1}})
        assert reply.status_code == 500
        assert reply.json() == {"instances": [{"error_msg": "id 9 is out of range"}]}

    rest(test)


def test_a_body_over_the_limit():
    async def chunks():
        for _ in range(20):
            yield bytes(100_000)

    async def test(launcher, worker, http):
        for content in (bytes(1_100_000), chunks()):
            reply = await http.post("/model/echo:predict", content=content)
            assert reply.status_code == 413
            assert "1048576 bytes" in reply.json()["error_msg"]
        assert (await http.post("/model/echo:predict", json={"instances": {"x": 1}})).status_code == 200

    rest(test, max_mb=1)


def test_a_body_of_too_many_strings():
    async def test(launcher, worker, http):
        strings = ",".join(['""'] * (MAX_STRINGS + 1))
        reply = await http.post("/model/echo:predict", content=f'{{"instances": {{"x": [{strings}]}}}}')
        assert reply.status_code == 413
        assert f"at most {MAX_STRINGS} elements of type str or bytes" in reply.json()["error_msg"]

    rest(test)


def test_a_deadline_and_a_client_that_leaves():
    async def test(launcher, worker, http):
        worker.script = keep
        started = time.monotonic()
        content = {"instances": {"x": 1}}
        reply = await http.post("/model/echo:predict", json=content, headers={"X-Request-Timeout": "0.3"})
        assert reply.status_code == 504
        assert reply.json()["error_msg"].startswith("waited ")
        assert time.monotonic() - started < 10
        first = await worker.next(front.Infer)
        assert (await worker.next(front.Cancel)).request == first.request
        post = asyncio.create_task(http.post("/model/echo:predict", json=content))
        second = await worker.next(front.Infer)
        post.cancel()
        assert (await worker.next(front.Cancel)).request == second.request

    rest(test)


def test_paths_and_methods_that_are_none():
    async def test(launcher, worker, http):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            reply = await http.request(method, "/nothing")
            assert reply.status_code == 404
            assert reply.headers["content-type"] == "application/json"
            assert not reply.content if method == "HEAD" else f"{method} /nothing isn't" in reply.json()["error_msg"]
        for method, path, allowed in [
            ("GET", "/model/echo:predict", {"POST"}),
            ("HEAD", "/model/echo:predict", {"POST"}),
            ("DELETE", "/model/echo/version/1:predict", {"POST"}),
            ("POST", "/healthz", {"GET", "HEAD"}),
        ]:
            reply = await http.request(method, path)
            assert reply.status_code == 405
            assert set(reply.headers["allow"].split(", ")) == allowed
            assert method == "HEAD" or list(reply.json()) == ["error_msg"]
        assert (await http.head("/healthz")).status_code == 200
        # Not a redirect, whose Location would be made of the client's Host.
        for method, path in (("POST", "/model/echo:predict/"), ("GET", "/healthz/")):
            reply = await http.request(method, path)
            assert (reply.status_code, reply.headers.get("location")) == (404, None)
            assert f"{method} {path} isn't" in reply.json()["error_msg"]

    rest(test)


def test_too_many_requests(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_MAX_REQUESTS", "1")

    async def test(launcher, worker, http):
        worker.script = keep
        content = {"instances": {"x": 1}}
        first = asyncio.create_task(http.post("/model/echo:predict", json=content))
        kept = await worker.next(front.Infer)
        reply = await http.post("/model/echo:predict", json=content)
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert "1 requests wait for an answer already" in reply.json()["error_msg"]
        worker.send(front.Reply(kept.request, [front.InstanceOutputs(kept.instances[0])]), [bytes(64)])
        assert (await first).status_code == 200

    rest(test)


def test_bodies_that_are_being_received_are_bounded(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_MAX_RECEIVING_BYTES", "100000")
    good = b'{"instances": {"x": 1}}'
    # Alone a body may be larger than the bound.
    start, end = good + b" " * 120_000, b" " * 1000
    head = b"POST /model/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(start + end)

    async def begin(http):
        reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        writer.write(head + start)
        return asyncio.create_task(reader.readline()), writer

    async def test(launcher, worker, http):
        async def until_refused():
            answer, writer = await begin(http)
            while (reply := await http.post("/model/echo:predict", content=good)).status_code == 200:
                if answer.done():  # It came while one of ours was there, and is the one that was refused.
                    writer.close()
                    answer, writer = await begin(http)
            return reply, answer, writer

        reply, answer, writer = await asyncio.wait_for(until_refused(), 20)
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert "bytes are being received already, at most 100000 at once" in reply.json()["error_msg"]
        writer.write(end)
        assert (await answer).startswith(b"HTTP/1.1 200 ")
        writer.close()
        assert (await http.post("/model/echo:predict", content=start)).status_code == 200

    rest(test)


def test_a_deadline_while_the_body_comes():
    async def test(launcher, worker, http):
        reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        head = b"POST /model/echo:predict HTTP/1.1\r\nHost: x\r\nX-Request-Timeout: 0.3\r\nContent-Length: 100\r\n\r\n"
        writer.write(head + b'{"instances": {')
        reply = await asyncio.wait_for(reader.readuntil(b"}"), 10)
        assert reply.startswith(b"HTTP/1.1 504 ")
        assert b"s for the body to come; 15 bytes of 100 came" in reply
        writer.close()
        await writer.wait_closed()

    rest(test)


def test_a_body_that_stalls_ends_with_its_connection(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_RECEIVE_TIMEOUT", "1")
    monkeypatch.setenv("SHARDSERVE_MAX_RECEIVING_BYTES", "100000")
    start = b'{"instances": {"x": 1}}' + b" " * 120_000
    said = b"waited 1 s (receive_timeout) for more of the body; %d bytes%b came"

    async def test(launcher, worker, http):
        for header, chunk, of in [
            (b"Content-Length: 200000", start, b" of 200000"),
            (b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(start), start), b""),
        ]:
            reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
            writer.write(b"POST /model/echo:predict HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n%b" % (header, chunk))
            reply = await asyncio.wait_for(reader.read(), 10)  # Up to the end of the connection.
            assert reply.startswith(b"HTTP/1.1 504 ")
            assert said % (len(start), of) in reply
            writer.close()
            # It counts no more: over the bound only a body that comes alone is taken.
            assert (await http.post("/model/echo:predict", content=start)).status_code == 200

    rest(test)


def test_a_body_that_comes_slowly_is_taken(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_RECEIVE_TIMEOUT", "1.5")

    async def pieces():
        for byte in b'{"instances": {"x": 1}}':
            await asyncio.sleep(0.1)
            yield bytes([byte])

    async def test(launcher, worker, http):
        began = time.monotonic()
        assert (await http.post("/model/echo:predict", content=pieces())).status_code == 200
        assert time.monotonic() - began > 1.5

    rest(test)


def test_not_yet_available_and_health():
    async def run():
        async with Launcher() as launcher:
            base = f"http://{await launcher.rest()}"
            async with httpx.AsyncClient(base_url=base, timeout=20) as http:
                reply = await http.post("/model/echo:predict", json={"instances": {"x": 1}})
                assert reply.status_code == 503
                assert "not available yet" in reply.json()["error_msg"]
                assert reply.headers["retry-after"] == "1"
                assert (await http.get("/healthz")).status_code == 503
                async with attached(launcher, Worker()):
                    reply = await http.get("/healthz")
                    assert reply.status_code == 200
                    assert reply.json() == {"ready": True, "servables": {"echo:1": "ready"}}

    asyncio.run(run())


def test_a_large_array():
    async def test(launcher, worker, http):
        array = np.random.default_rng(0).random((300, 400)).astype(np.float32)
        reply = await http.post("/model/echo:predict", json={"instances": {"x": array.tolist()}})
        assert np.array_equal(np.float32(reply.json()["instances"][0]["x"]), array)

    rest(test)


def test_an_output_that_json_has_no_room_for():
    async def test(launcher, worker, http):
        empty = {"x": {"b64": "", "type": "fp32", "shape": [1 << 40, 0]}}  # It is given back.
        reply = await http.post("/model/echo:predict", json={"instances": [empty, {"x": 1}]})
        assert reply.status_code == 200
        refused, good = reply.json()["instances"]
        assert refused["error_msg"].startswith("output 'x' of shape [1099511627776, 0] is 1099511627777 arrays in JSON")
        assert good == {"x": [1]}
        assert (await http.post("/model/echo:predict", json={"instances": empty})).status_code == 413

    rest(test)
