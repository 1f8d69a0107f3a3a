import copy
import json
import random

import pytest

from shardserve.errors import RankTableError
from shardserve.worker.rank_table import RankEntry, load_rank_table, parse_rank_table


def device(rank, number):
    return {"device_id": str(number), "device_ip": f"192.98.92.{rank}", "rank_id": str(rank)}


SERVER_LIST = {
    "version": "1.0",
    "server_count": "2",
    "status": "completed",
    "server_list": [
        {"server_id": "10.0.0.1", "device": [device(0, 0), device(1, 1)], "host_nic_ip": "reserve"},
        {"server_id": "10.0.0.2", "device": [device(2, 0), device(3, 7)], "host_nic_ip": "reserve"},
    ],
}


def instance(rank, host, number):
    return {
        "devices": [{"device_id": str(number), "device_ip": f"192.98.92.{rank}"}],
        "rank_id": str(rank),
        "server_id": host,
    }


GROUP_LIST = {
    "board_id": "0x0000",
    "group_count": "1",
    "group_list": [
        {
            "device_num": "4",
            "server_num": "2",
            "group_name": "",
            "instance_count": "4",
            "instance_list": [
                instance(0, "10.0.0.1", 0),
                instance(1, "10.0.0.1", 1),
                instance(2, "10.0.0.2", 0),
                instance(3, "10.0.0.2", 7),
            ],
        }
    ],
    "status": "completed",
}

ENTRIES = (
    RankEntry(0, "10.0.0.1", "0"),
    RankEntry(1, "10.0.0.1", "1"),
    RankEntry(2, "10.0.0.2", "0"),
    RankEntry(3, "10.0.0.2", "7"),
)

MISSING = object()


def changed(document, path, value):
    """A copy in which what is at `path` is `value`."""
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is MISSING:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


def json_path(path):
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


@pytest.mark.parametrize("document", [SERVER_LIST, GROUP_LIST])
def test_both_layouts(document):
    table = parse_rank_table(document)
    assert table.entries == ENTRIES
    assert table.hosts == ("10.0.0.1", "10.0.0.2")
    assert table.ranks_on(("10.0.0.2",)) == (2, 3)
    assert table.ranks_on(("10.0.0.3",)) == ()


def test_ranks_may_come_in_any_order():
    chance = random.Random(3)
    for _ in range(5):
        servers, groups = copy.deepcopy(SERVER_LIST), copy.deepcopy(GROUP_LIST)
        for server in servers["server_list"]:
            chance.shuffle(server["device"])
        chance.shuffle(servers["server_list"])
        chance.shuffle(groups["group_list"][0]["instance_list"])
        assert parse_rank_table(servers).entries == ENTRIES
        assert parse_rank_table(groups).entries == ENTRIES


def fields(document, path=()):
    """The path of each field of a document, however deep."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from fields(value, (*path, key))


FIELDS = [(document, path) for document in (SERVER_LIST, GROUP_LIST) for path in fields(document)]
# What each field is, by its name: a field that isn't here fails test_every_field_has_a_kind.
KINDS = {
    "list": {"server_list", "device", "group_list", "instance_list", "devices"},
    "text": {"server_id", "device_ip"},
    "decimal": {"rank_id", "device_id", "server_count", "group_count", "device_num", "server_num", "instance_count"},
    "note": {"version", "host_nic_ip", "board_id", "group_name"},
    "status": {"status"},
}


def of_kind(*kinds):
    return [(document, path) for document, path in FIELDS if any(path[-1] in KINDS[kind] for kind in kinds)]


def test_every_field_has_a_kind():
    assert {path[-1] for _, path in FIELDS} == set().union(*KINDS.values())


def items():
    """The path of each object in a list."""
    for document, path in of_kind("list"):
        value = document
        for key in path:
            value = value[key]
        yield from ((document, (*path, i)) for i in range(len(value)))


def wrong_values():
    for document, path in of_kind("list", "text", "decimal"):
        # Without the list at its root, a document has no layout.
        if path not in (("server_list",), ("group_list",)):
            yield document, path, MISSING, "is missing"
    for document, path in of_kind("list"):
        for value in ([], {}, "x", 3, None):
            yield document, path, value, f"is {json.dumps(value)}, not a list with at least one entry"
    for document, path in of_kind("text", "decimal"):
        for value in ("", 0, None, ["0"], {}, True):
            yield document, path, value, f"is {json.dumps(value)}, not a string with something in it"
    for document, path in of_kind("decimal"):
        for value in ("01", "+1", "-1", " 1", "1.0", "one", "0x1", "١", "²"):
            yield document, path, value, f"is {json.dumps(value)}, not a canonical decimal"
        yield document, path, "1" * 5000, f'is "{"1" * 56}..., not a canonical decimal'
    for document, path in of_kind("note"):
        for value in (1.0, None, [], {}, True):
            yield document, path, value, f"is {json.dumps(value)}, not a string"
    for document, path in of_kind("status"):
        for value in ("", "initializing", 1, None, ["completed"]):
            yield document, path, value, f'is {json.dumps(value)}, not "completed"'
    for document, path in items():
        for value in ("x", [], None, 3):
            yield document, path, value, f"is {json.dumps(value)}, not an object"


@pytest.mark.parametrize(
    ("document", "path", "value", "said"),
    [pytest.param(*case, id=f"{json_path(case[1])}-{i}") for i, case in enumerate(wrong_values())],
)
def test_wrong_value(document, path, value, said):
    with pytest.raises(RankTableError) as caught:
        parse_rank_table(changed(document, path, value))
    assert str(caught.value) == f"{json_path(path)} {said}"


@pytest.mark.parametrize(
    ("document", "path", "value", "said"),
    [
        (SERVER_LIST, ("server_count",), "3", "$.server_count is 3, but there are 2"),
        (GROUP_LIST, ("group_count",), "2", "$.group_count is 2, but there are 1"),
        (GROUP_LIST, ("group_list", 0, "instance_count"), "5", "$.group_list[0].instance_count is 5, but there are 4"),
        (GROUP_LIST, ("group_list", 0, "device_num"), "2", "$.group_list[0].device_num is 2, but there are 4"),
        (GROUP_LIST, ("group_list", 0, "server_num"), "4", "$.group_list[0].server_num is 4, but there are 2"),
        (
            SERVER_LIST,
            ("server_list", 1, "device", 1, "rank_id"),
            "0",
            "$.server_list[1].device[1].rank_id 0 is also that of $.server_list[0].device[0]",
        ),
        (
            SERVER_LIST,
            ("server_list", 1, "device", 1, "rank_id"),
            "4",
            "$.server_list[1].device[1].rank_id is 4, but there are 4 ranks, and no rank_id 3",
        ),
        (
            SERVER_LIST,
            ("server_list", 1, "device", 1, "device_id"),
            "0",
            "$.server_list[1].device[1]: device 0 of host 10.0.0.2 is also that of $.server_list[1].device[0]",
        ),
        (
            SERVER_LIST,
            ("server_list", 1, "server_id"),
            "10.0.0.1",
            "$.server_list[1].device[0]: device 0 of host 10.0.0.1 is also that of $.server_list[0].device[0]",
        ),
        (
            GROUP_LIST,
            ("group_list", 0, "instance_list", 2, "rank_id"),
            "1",
            "$.group_list[0].instance_list[2].rank_id 1 is also that of $.group_list[0].instance_list[1]",
        ),
        (
            GROUP_LIST,
            ("group_list", 0, "instance_list", 2, "devices"),
            [{"device_id": "0", "device_ip": "a"}] * 2,
            "$.group_list[0].instance_list[2].devices has 2 devices; a rank has one",
        ),
    ],
)
def test_what_does_not_agree(document, path, value, said):
    with pytest.raises(RankTableError) as caught:
        parse_rank_table(changed(document, path, value))
    assert str(caught.value) == said


def each(cases):
    return [pytest.param(*case, id=json_path(case[1])) for case in cases]


@pytest.mark.parametrize(("document", "path"), each(case for case in of_kind("decimal") if case[1][-1] != "device_id"))
def test_every_count_and_rank_has_to_agree_with_the_others(document, path):
    with pytest.raises(RankTableError) as caught:
        parse_rank_table(changed(document, path, "8"))
    assert str(caught.value).startswith(f"{json_path(path)} is 8, but there are ")


@pytest.mark.parametrize(("document", "path"), each(case for case in of_kind("decimal") if case[1][-1] == "rank_id"))
def test_every_rank_is_given_once(document, path):
    for other in "0123":
        table = changed(document, path, other)
        if table == document:
            continue
        with pytest.raises(RankTableError) as caught:
            parse_rank_table(table)
        assert f".rank_id {other} is also that of $." in str(caught.value)


@pytest.mark.parametrize(("document", "path"), each(case for case in of_kind("decimal") if case[1][-1] == "device_id"))
def test_every_device_is_given_once_a_host(document, path):
    """The device of the other rank on the same host."""
    host = "10.0.0.2" if path[1] == 1 or (len(path) > 4 and path[3] > 1) else "10.0.0.1"
    here = [entry.device for entry in ENTRIES if entry.host == host]
    for other in here:
        table = changed(document, path, other)
        if table == document:
            continue
        with pytest.raises(RankTableError) as caught:
            parse_rank_table(table)
        assert f": device {other} of host {host} is also that of $." in str(caught.value)


@pytest.mark.parametrize(("document", "path"), each(of_kind("note", "status")))
def test_what_says_nothing_about_ranks_may_be_missing(document, path):
    assert parse_rank_table(changed(document, path, MISSING)).entries == ENTRIES


def twice(document, path):
    """The document's text with the field at `path` written a second time."""
    mark = "the second one"
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    value = parent[path[-1]]
    text = json.dumps(changed(document, (*path[:-1], mark), value))
    return text.replace(json.dumps(mark), json.dumps(path[-1]))


@pytest.mark.parametrize(("document", "path"), each(FIELDS))
def test_a_field_that_is_given_twice(tmp_path, document, path):
    file = tmp_path / "ranks.json"
    file.write_text(twice(document, path))
    with pytest.raises(RankTableError) as caught:
        load_rank_table(str(file), 4, 1)
    assert str(caught.value) == f"rank table {file}: {json_path(path)} is given twice"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "$ is [], not an object"),
        (None, "$ is null, not an object"),
        ({}, "$ has neither server_list nor group_list"),
    ],
)
def test_no_layout(document, said):
    with pytest.raises(RankTableError) as caught:
        parse_rank_table(document)
    assert str(caught.value) == said


def test_load(tmp_path):
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(SERVER_LIST))
    assert load_rank_table(str(file), 4, 2).entries == ENTRIES
    # Two replicas.
    assert load_rank_table(str(file), 2, 1).entries == ENTRIES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON: "),
        (b"", "not JSON: "),
        (b"\xff\xfe", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"server_list": []}', "$.server_list is [], not a list"),
        (
            json.dumps(SERVER_LIST).encode(),
            "$ has 4 ranks; the servable declares rank_size=3, stage_size=1, so it needs 3",
        ),
    ],
)
def test_errors_name_the_file(tmp_path, content, said):
    file = tmp_path / "ranks.json"
    file.write_bytes(content)
    with pytest.raises(RankTableError) as caught:
        load_rank_table(str(file), 3, 1)
    assert str(caught.value).startswith(f"rank table {file}: {said}")


def test_missing_file(tmp_path):
    with pytest.raises(RankTableError, match=rf"rank table {tmp_path}/none.json: No such file"):
        load_rank_table(f"{tmp_path}/none.json", 1, 1)
    with pytest.raises(RankTableError, match=rf"rank table {tmp_path}: Is a directory"):
        load_rank_table(str(tmp_path), 1, 1)
