"""Pickles are read without running anything, whatever they ask for."""

from __future__ import annotations

import base64
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from typing import Any

import numpy as np
import pytest

from agc.errors import FormatError
from agc.weights import load
from agc.weights.files import open_source
from agc.weights.pickles import read_pickle

TREE = {
    "NFNet/~/linear": {"w": np.arange(6, dtype="f4").reshape(2, 3), "b": np.float32([1, 2, 3])},
    "NFNet/~/nf_block": {"skip_gain": np.array(0.5, "f4")},
}
EXPECTED = {
    f"{module}/{name}": leaf for module, leaves in TREE.items() for name, leaf in leaves.items()
}

# What dill itself makes of this tree, plus an array in Fortran order and a scalar: the version of
# the time of DeepMind's release, which reaches NumPy's functions through two of its own, and a
# later one.
DILL = {
    "0.3.3, dict, protocol 3": """
        gAN9cQAoWA4AAABORk5ldC9+L2xpbmVhcnEBfXECKFgBAAAAd3EDY2RpbGwuX2RpbGwKX2dldF9hdHRyCnEEY2Rp
        bGwuX2RpbGwKX2ltcG9ydF9tb2R1bGUKcQVYHQAAAG51bXB5Ll9jb3JlLl9tdWx0aWFycmF5X3VtYXRocQaFcQdS
        cQhYDAAAAF9yZWNvbnN0cnVjdHEJhnEKUnELY251bXB5Cm5kYXJyYXkKcQxLAIVxDUMBYnEOh3EPUnEQKEsBSwJL
        A4ZxEWNudW1weQpkdHlwZQpxElgCAAAAZjRxE4mIh3EUUnEVKEsDWAEAAAA8cRZOTk5K/////0r/////SwB0cRdi
        iUMYAAAAAAAAgD8AAABAAABAQAAAgEAAAKBAcRh0cRliWAEAAABicRpoC2gMSwCFcRtoDodxHFJxHShLAUsDhXEe
        aBWJQwwAAIA/AAAAQAAAQEBxH3RxIGJ1WBAAAABORk5ldC9+L25mX2Jsb2NrcSF9cSJYCQAAAHNraXBfZ2FpbnEj
        aAtoDEsAhXEkaA6HcSVScSYoSwEpaBWJQwQAAAA/cSd0cShic1gBAAAARnEpfXEqKFgBAAAAZnEraAtoDEsAhXEs
        aA6HcS1ScS4oSwFLAksDhnEvaBWIQxgAAAAAAABAQAAAgD8AAIBAAAAAQAAAoEBxMHRxMWJYAQAAAHNxMmgEaAhY
        BgAAAHNjYWxhcnEzhnE0UnE1aBVDBAAAQEBxNoZxN1JxOHV1Lg==
    """,
    "0.3.3, FlatMapping": """
        gASVFQIAAAAAAACMGmhhaWt1Ll9zcmMuZGF0YV9zdHJ1Y3R1cmVzlIwLRmxhdE1hcHBpbmeUk5R9lCiMDk5GTmV0
        L34vbGluZWFylGgCfZQojAF3lIwKZGlsbC5fZGlsbJSMCV9nZXRfYXR0cpSTlGgHjA5faW1wb3J0X21vZHVsZZST
        lIwdbnVtcHkuX2NvcmUuX211bHRpYXJyYXlfdW1hdGiUhZRSlIwMX3JlY29uc3RydWN0lIaUUpSMBW51bXB5lIwH
        bmRhcnJheZSTlEsAhZRDAWKUh5RSlChLAUsCSwOGlGgSjAVkdHlwZZSTlIwCZjSUiYiHlFKUKEsDjAE8lE5OTkr/
        ////Sv////9LAHSUYolDGAAAAAAAAIA/AAAAQAAAQEAAAIBAAACgQJR0lGKMAWKUaBFoFEsAhZRoFoeUUpQoSwFL
        A4WUaB6JQwwAAIA/AAAAQAAAQECUdJRidYWUUpSMEE5GTmV0L34vbmZfYmxvY2uUaAJ9lIwJc2tpcF9nYWlulGgR
        aBRLAIWUaBaHlFKUKEsBKWgeiUMEAAAAP5R0lGJzhZRSlIwBRpRoAn2UKIwBZpRoEWgUSwCFlGgWh5RSlChLAUsC
        SwOGlGgeiEMYAAAAAAAAQEAAAIA/AACAQAAAAEAAAKBAlHSUYowBc5RoCWgOjAZzY2FsYXKUhpRSlGgeQwQAAEBA
        lIaUUpR1hZRSlHWFlFKULg==
    """,
    "0.4.1, dict": """
        gASVwgEAAAAAAAB9lCiMDk5GTmV0L34vbGluZWFylH2UKIwBd5SMCmRpbGwuX2RpbGyUjA1fY3JlYXRlX2FycmF5
        lJOUKIwWbnVtcHkuX2NvcmUubXVsdGlhcnJheZSMDF9yZWNvbnN0cnVjdJSTlIwFbnVtcHmUjAduZGFycmF5lJOU
        SwCFlEMBYpSHlChLAUsCSwOGlGgKjAVkdHlwZZSTlIwCZjSUiYiHlFKUKEsDjAE8lE5OTkr/////Sv////9LAHSU
        YolDGAAAAAAAAIA/AAAAQAAAQEAAAIBAAACgQJR0lE50lFKUjAFilGgGKGgJaAxLAIWUaA6HlChLAUsDhZRoFYlD
        DAAAgD8AAABAAABAQJR0lE50lFKUdYwQTkZOZXQvfi9uZl9ibG9ja5R9lIwJc2tpcF9nYWlulGgGKGgJaAxLAIWU
        aA6HlChLASloFYlDBAAAAD+UdJROdJRSlHOMAUaUfZQojAFmlGgGKGgJaAxLAIWUaA6HlChLAUsCSwOGlGgViEMY
        AAAAAAAAQEAAAIA/AACAQAAAAEAAAKBAlHSUTnSUUpSMAXOUaAeMBnNjYWxhcpSTlGgVQwQAAEBAlIaUUpR1dS4=
    """,
}


def read(tmp_path, data):
    path = tmp_path / "weights.pkl"
    path.write_bytes(data)
    return read_pickle(path)


@pytest.mark.parametrize("name", DILL)
def test_files_of_dill(tmp_path, name):
    data = base64.b64decode("".join(DILL[name].split()))
    found = read(tmp_path, data)
    assert found.keys() == {*EXPECTED, "F/f", "F/s"}
    for key, value in {**EXPECTED, "F/f": EXPECTED["NFNet/~/linear/w"], "F/s": 3}.items():
        assert found[key].dtype == "float32"
        np.testing.assert_array_equal(found[key], value)
        assert found[key].shape == np.shape(value)
    if data[1] == 4:  # as DeepMind had them: from NumPy 1
        again = read(tmp_path, of_numpy_1(data))
        assert all(np.array_equal(again[key], found[key]) for key in found)


def of_numpy_1(data):
    """Return a pickle of protocol 4 with NumPy 1's names: shorter by a byte, frame included."""
    (length,), body = struct.unpack("<Q", data[3:11]), data[11:]
    for name in (b"numpy._core._multiarray_umath", b"numpy._core.multiarray"):
        older = name.replace(b"_core", b"core")
        length -= body.count(name)
        body = body.replace(bytes([len(name)]) + name, bytes([len(older)]) + older)
    return data[:3] + struct.pack("<Q", length) + body


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_pickles_of_arrays(tmp_path, protocol, dtype):
    tree = {
        "m": {
            "a": np.arange(24, dtype=dtype).reshape(2, 3, 4),
            "t": np.arange(6, dtype=dtype).reshape(2, 3).T,
            "oihw": np.arange(120, dtype=dtype).reshape(2, 3, 4, 5).transpose(3, 2, 0, 1),
            "empty": np.zeros((0, 3), dtype),
            "zero": np.array(7, dtype),
            "scalar": np.dtype(dtype).type(8),
        }
    }
    found = read(tmp_path, pickle.dumps(tree, protocol))
    for name, value in tree["m"].items():
        np.testing.assert_array_equal(found[f"m/{name}"], value)
        assert found[f"m/{name}"].shape == value.shape
        assert found[f"m/{name}"].dtype == value.dtype


class Call:
    """What is pickled as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def transposed(axes, order="K"):
    """What NumPy 2.4 makes of a transposed array in protocol 5, by hand; any NumPy gives the
    name.
    """
    values = np.arange(120, dtype="f4")
    made = Call(
        np.zeros(2).__reduce_ex__(5)[0], values.tobytes(), values.dtype, (2, 3, 4, 5), order, *axes
    )
    return pickle.dumps({"m": {"a": made}}, 5)


def test_order_of_axes(tmp_path):
    found = read(tmp_path, transposed([(3, 2, 0, 1)]))["m/a"]
    values = np.arange(120, dtype="f4").reshape(2, 3, 4, 5).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (transposed([(3, 2, 0)]), "axes do not fit"),
        (transposed([(3, 2, 0, 0)]), "axes do not fit"),
        (transposed([(3, 2, 0, 4)]), "axes do not fit"),
        (transposed([(3, 2, 0, -3)]), "axes do not fit"),
        (transposed([(3, 2, 0, "1")]), "axes do not fit"),
        (transposed([[3, 2, 0, 1]]), "axes do not fit"),
        (transposed([]), "axes do not fit"),
        (transposed([(3, 2, 0, 1)], "C"), "axes that its order does not need"),
        (transposed([], "A"), "bytes do not fit"),
    ],
)
def test_wrong_orders_of_axes(tmp_path, data, message):
    with pytest.raises(FormatError, match=message):
        read(tmp_path, data)


# --- Malicious files

MARK = "executed"


def touch():
    return f"open({MARK!r}, 'w').close()"


def stack_global(module, name):
    return b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


SHELL = f"{sys.executable} -c \"open('{MARK}', 'w').close()\""

# Each of these runs the code above when it is loaded with pickle.load: the test shows that first.
BITING = {
    "os.system": lambda: pickle.dumps(Call(os.system, SHELL)),
    "os.system, protocol 2": lambda: pickle.dumps(Call(os.system, SHELL), 2),
    "subprocess": lambda: pickle.dumps(
        Call(subprocess.check_call, [sys.executable, "-c", touch()])
    ),
    "builtins.eval": lambda: pickle.dumps(Call(eval, touch())),
    "builtins.exec": lambda: pickle.dumps(Call(exec, touch())),
    "as a leaf": lambda: pickle.dumps({"NFNet/~/linear": {"w": Call(eval, touch())}}),
    "as a key": lambda: pickle.dumps({Call(str, Call(exec, touch())): {}}),
    "as a module": lambda: pickle.dumps({**TREE, "more": Call(eval, touch())}),
    "nested in arguments": lambda: pickle.dumps(Call(dict, [(Call(str, Call(eval, touch())), 1)])),
    "as the state of an array": lambda: pickle.dumps(
        {"m": {"w": Call(list, [np.zeros(2, "f4"), Call(eval, touch())])}}
    ),
    "in an array of objects": lambda: pickle.dumps(
        {"m": {"w": np.array([1.0, Call(eval, touch())], dtype=object)}}
    ),
    "in a dtype's metadata": lambda: pickle.dumps(
        {"m": {"w": Call(np.dtype, "f4", state=(3, "<", None, None, Call(eval, touch())))}}
    ),
    "by numpy's own tools": lambda: pickle.dumps(Call(np.testing.runstring, touch(), {})),
    "the opcode INST": lambda: b"(S" + repr(touch()).encode() + b"\nibuiltins\neval\n.",
    "the opcode OBJ": lambda: b"(cbuiltins\neval\n" + text(touch()) + b"o.",
    "the opcode GLOBAL": lambda: b"\x80\x02cbuiltins\neval\n" + text(touch()) + b"\x85R.",
    "the opcode STACK_GLOBAL": lambda: (
        b"\x80\x04" + stack_global(b"builtins", b"eval") + text(touch()) + b"\x85R."
    ),
    "dotted names": lambda: (
        b"\x80\x04" + stack_global(b"os", b"path.os.system") + text(SHELL) + b"\x85R."
    ),
    "by way of the module": lambda: (
        b"\x80\x04"
        + stack_global(b"builtins", b"getattr")
        + stack_global(b"importlib", b"import_module")
        + text("builtins")
        + b"\x85R"
        + text("eval")
        + b"\x86R"
        + text(touch())
        + b"\x85R."
    ),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BITING)
def test_malicious_files_execute_nothing(here, name):
    data = BITING[name]()
    try:
        pickle.loads(data)
    except Exception as error:  # some fail after the harm is done
        print(error)
    assert (here / MARK).exists(), "this file does no harm, so it shows nothing"
    (here / MARK).unlink()
    modules = set(sys.modules)
    with pytest.raises(FormatError, match=r"refused, this pickle|not a readable pickle|holds"):
        # Protocols 0 and 1 have no mark at the start, and are not even taken for pickles.
        read(here, data)
    assert not (here / MARK).exists()
    assert set(sys.modules) == modules


DILL_IMPORT = stack_global(b"dill._dill", b"_import_module")
DILL_GET = stack_global(b"dill._dill", b"_get_attr")
DILL_ARRAY = stack_global(b"dill._dill", b"_create_array")
RECONSTRUCT = stack_global(b"numpy.core.multiarray", b"_reconstruct")
NDARRAY = stack_global(b"numpy", b"ndarray")
DTYPE = stack_global(b"numpy", b"dtype")
F4 = DTYPE + text("f4") + b"\x89\x88\x87R"
EMPTY = NDARRAY + b"K\x00\x85C\x01b\x87"  # the arguments of _reconstruct

# What goes beyond the needed through names that are allowed, or is not there for pickle.loads to
# run.
CRAFTED = {
    "dill's import of os": (
        DILL_GET + DILL_IMPORT + text("os") + b"\x85R" + text("system") + b"\x86R",
        r"asks for os\.system",
    ),
    "dill's attribute of an attribute": (
        DILL_GET + DILL_GET + DILL_IMPORT + text("numpy") + b"\x85R" + text("dtype") + b"\x86R"
        + text("__init__") + b"\x86R",
        r"takes the attribute '__init__' of numpy\.dtype",
    ),
    "dill's attribute of text": (
        DILL_GET + text("x") + text("__class__") + b"\x86R",
        "takes the attribute '__class__' of 'x'",
    ),
    "dill's functions": (stack_global(b"dill._dill", b"_create_function"), "asks for dill"),
    "dill's types": (stack_global(b"dill._dill", b"_load_type"), "asks for dill"),
    "dill's array by another function": (
        DILL_ARRAY + DILL_IMPORT + text("os") + b"\x85N\x87R",
        "makes an array with",
    ),
    "dill's array with attributes": (
        DILL_ARRAY + b"(" + RECONSTRUCT + EMPTY + b"N}" + text("a") + b"K\x01st" + b"R",
        "makes an array with",
    ),
    "a persistent id": (b"\x8c\x01xQ", "refers to something outside of it, 'x'"),
    "a persistent id in text": (b"Pstorage\n", "refers to something outside of it, 'storage'"),
    "a subclass of arrays": (
        RECONSTRUCT + stack_global(b"numpy", b"dtype") + b"K\x00\x85C\x01b\x87R",
        r"makes an array of the class numpy\.dtype",
    ),
    "numpy's memmap": (stack_global(b"numpy", b"memmap"), r"asks for numpy\.memmap"),
    "numpy's load": (stack_global(b"numpy", b"load"), r"asks for numpy\.load"),
    "a call of ndarray": (
        NDARRAY + b"K\x05\x85\x85R",
        r"calls numpy\.ndarray",
    ),
    "dtype of objects": (DTYPE + text("O8") + b"\x89\x88\x87R", "dtype 'O8', where only f2, f4"),
    "dtype of records": (
        DTYPE + b"]" + b"\x89\x88\x87R",
        r"dtype \[\], where only f2, f4",
    ),
    "dtype whose state has fields and flags": (
        F4 + b"(K\x03\x8c\x01|N\x8c\x01a\x85}K\x08K\x01K\x3ftb",
        "describes a dtype with fields",
    ),
    "more bytes than numbers": (
        RECONSTRUCT + EMPTY + b"R(K\x01K\x02\x85" + F4 + b"\x89C\x0c" + bytes(12) + b"tb",
        "bytes do not fit its shape",
    ),
    "more numbers than bytes": (
        RECONSTRUCT + EMPTY + b"R(K\x01" + b"J\xff\xff\xff\x7f\x85" + F4 + b"\x89C\x04" + bytes(4)
        + b"tb",
        "bytes do not fit its shape",
    ),
    "a negative size": (
        RECONSTRUCT + EMPTY + b"R(K\x01" + b"J\xff\xff\xff\xff" * 2 + b"\x86" + F4 + b"\x89C\x04"
        + bytes(4) + b"tb",
        "bytes do not fit its shape",
    ),
    "a list of objects for bytes": (
        RECONSTRUCT + EMPTY + b"R(K\x01K\x01\x85" + F4 + b"\x89]tb",
        "bytes do not fit its shape",
    ),
    "attributes of a function": (
        RECONSTRUCT + b"N}" + text("_run") + NDARRAY + b"s\x86b",
        r"changes numpy\.core\.multiarray\._reconstruct",
    ),
    "attributes of a function, plainly": (
        RECONSTRUCT + b"}" + text("_run") + NDARRAY + b"sb",
        r"changes numpy\.core\.multiarray\._reconstruct",
    ),
    "attributes of an array": (
        RECONSTRUCT + EMPTY + b"RN}" + text("value") + b"K\x01s\x86b",
        "describes an array that is not",
    ),
    "new objects of a class": (NDARRAY + b")\x81", "class argument"),
    "the extension registry": (b"\x82\x01", "unregistered extension code"),
    "other encodings": (
        stack_global(b"_codecs", b"encode") + text("x") + text("punycode") + b"\x86R",
        "as 'punycode'",
    ),
    "another codec": (stack_global(b"_codecs", b"decode"), r"asks for _codecs\.decode"),
    "a buffer from elsewhere": (b"\x97", "buffers"),
    "too many arguments": (DTYPE + b")R", "calls numpy.dtype with other arguments"),
    "a mapping of something else": (
        stack_global(b"haiku._src.data_structures", b"FlatMapping") + b"K\x01\x85R",
        "makes a mapping of a int",
    ),
    "not a dictionary": (b"]", "holds a list, not a dictionary of modules"),
    "no modules": (b"}" + text("m") + b"K\x01s", "module 'm' holds a int"),
    "no arrays": (b"}" + text("m") + b"}" + text("w") + b"]ss", "m/w is a list, not an array"),
    "an array without state": (
        b"}" + text("m") + b"}" + text("w") + RECONSTRUCT + EMPTY + b"Rss",
        "m/w is an unfinished array, not an array",
    ),
    "an allowed name for an array": (
        b"}" + text("m") + b"}" + text("w") + NDARRAY + b"ss",
        "m/w is a Global, not an array",
    ),
    "an endless string": (b"\x8d" + struct.pack("<Q", 2**62), "not a readable pickle"),
    "nothing on the stack": (b"0", "not a readable pickle; unpickling stack underflow"),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files_are_refused(tmp_path, name):
    body, message = CRAFTED[name]
    with pytest.raises(FormatError, match=message):
        read(tmp_path, b"\x80\x04" + body + b".")
    # And nothing has been changed for the next file.
    assert read(tmp_path, pickle.dumps(TREE)).keys() == EXPECTED.keys()


def test_rest_after_the_end(tmp_path):
    with pytest.raises(FormatError, match="something follows the end"):
        read(tmp_path, pickle.dumps(TREE) + b"x")


def test_truncated(tmp_path):
    data = pickle.dumps(TREE)
    for end in range(1, len(data)):
        with pytest.raises(FormatError, match=r"weights\.pkl: "):
            read(tmp_path, data[:end])


class Watch:
    """Notes what the interpreter does; a hook cannot be removed, so it is switched."""

    on = False
    seen: list[str] = []  # noqa: RUF012
    watched = ("import", "exec", "compile", "open", "os.", "subprocess.", "ctypes.", "socket.")

    @classmethod
    def hook(cls, event, arguments):
        if cls.on and event.startswith(cls.watched):
            cls.seen.append(f"{event}{arguments!r}")


def test_the_interpreter_sees_nothing_but_the_file(tmp_path, monkeypatch):
    """Every file of this module, and a thousand damaged ones, under the interpreter's audit
    hook.
    """
    bodies = [b"\x80\x04" + body + b"." for body, _ in CRAFTED.values()]
    whole = [pickle.dumps(TREE, 2), *(base64.b64decode("".join(d.split())) for d in DILL.values())]
    draw = random.Random(0)
    files = bodies + whole + [make() for make in BITING.values()]
    for _ in range(1000):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        files.append(bytes(data))
    path = tmp_path / "file"
    path.write_bytes(whole[0])
    read_pickle(path)  # what Python loads at the first use is not of interest
    monkeypatch.setattr(Watch, "seen", [])
    sys.addaudithook(Watch.hook)
    read_count = 0
    for data in files:
        path.write_bytes(data)
        try:
            Watch.on = True
            read_pickle(path)
            read_count += 1
        except FormatError:
            pass  # refused: what this is about is what it did before
        finally:
            Watch.on = False
    assert read_count >= len(whole)
    opened = [event for event in Watch.seen if event.startswith("open")]
    assert len(opened) == len(files)  # the hook works
    assert all(f"'{path}'" in event for event in opened)
    assert Watch.seen == opened
    # and it would have seen this
    Watch.on = True
    try:
        pickle.loads(b"cos\ngetcwd\n)R.")
        eval(compile("1", "x", "eval"))
    finally:
        Watch.on = False
    assert len(Watch.seen) > len(opened)


# --- PyTorch's archives: the same pickles, and tensors that are not in them


def read_archive(tmp_path, data, numbers=b""):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/data/0", numbers)
    with open_source(tmp_path / "model.pth") as source:
        return source.contents[""]["a"].read()


def test_archives_with_malicious_pickles_execute_nothing(here):
    read_archive(here, stored(b"K\x00", b"K\x01\x85", b"K\x01\x85"), bytes(4))
    files = [make() for make in BITING.values()]
    modules = set(sys.modules)
    for data in files:
        with pytest.raises(FormatError, match=r"model\.pth: (refused by|truncated, or no r|holds)"):
            read_archive(here, data)
        assert not (here / MARK).exists()
    assert set(sys.modules) == modules


REBUILD = stack_global(b"torch._utils", b"_rebuild_tensor_v2")
FLOATS = b"(" + text("storage") + stack_global(b"torch", b"FloatStorage") + text("0") + text("cpu")
DICTIONARY = stack_global(b"collections", b"OrderedDict") + b")R"


def stored(offset, shape, strides, numbers=b"K\x04"):
    """Return the pickle of {"a": a tensor in a storage of four numbers}."""
    storage = FLOATS + numbers + b"tQ"
    tensor = REBUILD + b"(" + storage + offset + shape + strides + b"\x89" + DICTIONARY + b"tR"
    return b"\x80\x04" + DICTIONARY + text("a") + tensor + b"s."


def test_tensors_in_archives(tmp_path):
    numbers = np.arange(4, dtype="<f4").tobytes()
    found = read_archive(tmp_path, stored(b"K\x01", b"K\x03\x85", b"K\x01\x85"), numbers)
    np.testing.assert_array_equal(found, np.float32([1, 2, 3]))
    transposed = stored(b"K\x00", b"K\x02K\x02\x86", b"K\x01K\x02\x86")
    found = read_archive(tmp_path, transposed, numbers)
    np.testing.assert_array_equal(found, np.float32([[0, 2], [1, 3]]))
    with pytest.raises(FormatError, match=r"model\.pth: a cannot be read; .* fewer bytes"):
        read_archive(tmp_path, transposed, numbers[:8])


@pytest.mark.parametrize(("ways", "message"), [(1, "it holds nothing"), (9, "more than 10000")])
def test_circles_of_dictionaries(tmp_path, ways, message):
    tree: dict[str, Any] = {}
    tree |= {str(n): tree for n in range(ways)}
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(tree, 2))
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (b"K\x02", b"K\x03\x85", b"K\x01\x85"),  # behind the end
        (b"J\xff\xff\xff\xff", b"K\x03\x85", b"K\x01\x85"),
        (b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
        (b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"),  # more elements than numbers
        (b"K\x00", b"K\x02\x85", b"K\x01K\x01\x86"),
        (b"K\x00", b"K\x02\x85", text("a") + b"\x85"),
    ],
)
def test_tensors_that_are_not_in_their_storage(tmp_path, offset, shape, strides):
    with pytest.raises(FormatError, match="describes a tensor that does not fit its storage"):
        read_archive(tmp_path, stored(offset, shape, strides), bytes(16))


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_archives_cannot_change_the_reader(tmp_path, name):
    function = stack_global(b"torch._utils", name.encode())
    body = function + b"N}" + text("__defaults__") + b"K\x01\x85s\x86b"
    with pytest.raises(FormatError, match=rf"changes torch\._utils\.{name}"):
        read_archive(tmp_path, b"\x80\x04" + body + b".")
