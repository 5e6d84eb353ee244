"""The service of examples/service: its network, its answers by gunicorn and uvicorn, its page in a browser.

`make test-service` runs this, and installs what it needs.
"""

import fcntl
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families
from scipy.signal import correlate
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from threadpoolctl import threadpool_limits

SERVICE = Path(__file__).resolve().parents[2] / "examples" / "service"
sys.path.append(str(SERVICE))
import load
import metric_files
import network
import train

LIMIT = 256 * 1024  # bytes of a body
BLANK = [[0] * 8] * 8


@pytest.fixture(scope="session")
def data():
    """Training and test images, training and test labels."""
    return train.load_data()


@pytest.fixture(scope="module", params=["gunicorn", "uvicorn"])
def service(request):
    """(process, address) of a running service."""
    with load.serve(request.param) as running:
        yield running


@pytest.fixture
def address(service):
    return service[1]


# ---- the network


def test_convolution():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 6, 3)), rng.standard_normal((4, 3, 3, 3))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for image, result in zip(padded, network.conv3x3(x, weight), strict=True):
        for feature in range(4):
            expected = correlate(image, weight[feature].transpose(1, 2, 0), "valid")[..., 0]
            np.testing.assert_allclose(result[..., feature], expected)


@threadpool_limits.wrap(limits=1, user_api="blas")  # products this small gain nothing from more threads
def test_gradients_are_those_of_the_loss(data):
    """By central differences: along the gradient of a parameter the slope is the gradient's length."""
    images, _, labels, _ = data
    images, labels = images[:32], labels[:32]
    learner = train.TrainedNetwork(np.random.default_rng(0))

    def loss():
        return -np.log(learner.forward(images)[np.arange(32), labels]).mean()

    learner.backward(learner.forward(images), labels)
    assert learner.gradients.keys() == learner.parameters.keys()
    for name, gradient in learner.gradients.items():
        parameter, length = learner.parameters[name], np.linalg.norm(gradient)
        assert length > 1e-3, name  # or the differences would drown in rounding
        start, step, losses = parameter.copy(), 2e-3 * gradient / length, []
        for sign in (-1, 1):
            parameter[...] = start + sign * step
            losses.append(float(loss()))
        parameter[...] = start
        assert (losses[1] - losses[0]) / 4e-3 == pytest.approx(length, rel=0.02), name


def test_training_learns_and_repeats_itself(data):
    images, images_test, labels, labels_test = data
    once, again = (train.train(images, labels, epochs=2) for _ in range(2))
    assert train.accuracy(once, images_test, labels_test) > 0.9
    for name, array in once.items():
        np.testing.assert_array_equal(array, again[name], name)


@pytest.mark.parametrize("batch_norm", ["fastbn", "numpy"])
def test_committed_weights_read_digits(data, batch_norm):
    _, images, _, labels = data
    probabilities, seconds = network.load(batch_norm)(images)
    assert (probabilities.argmax(1) == labels).mean() > 0.98
    assert seconds > 0


@pytest.mark.parametrize("batch_norm", ["fastbn", "numpy"])
def test_what_is_served_is_what_was_trained(data, batch_norm):
    images = data[0][:256]
    learner = train.TrainedNetwork(np.random.default_rng(0))
    for start in range(0, 256, 64):
        learner.forward(images[start : start + 64])  # for the running averages
    for norm in learner.norms.values():
        norm.eval()
    probabilities, _ = network.Network(learner.weights(), batch_norm)(images)
    np.testing.assert_allclose(probabilities, learner.forward(images), atol=2e-6)


def test_unknown_batch_norm_is_an_error():
    with pytest.raises(ValueError, match="must be 'fastbn' or 'numpy', got 'torch'"):
        network.load("torch")


# ---- the service


@pytest.mark.parametrize("batch_norm", [None, "fastbn", "numpy"])
def test_answers_are_those_of_the_numpy_network(address, data, batch_norm):
    _, images, _, _ = data
    numpy_network = network.load("numpy")
    wish = {"batch_norm": batch_norm} if batch_norm else {}
    for start in range(0, len(images), 64):
        batch = images[start : start + 64]
        response = httpx.post(f"{address}/predict", json={"images": batch.tolist()} | wish)
        assert response.status_code == 200
        answer = response.json()
        expected, _ = numpy_network(batch)
        assert answer["digits"] == expected.argmax(1).tolist()
        np.testing.assert_allclose(answer["probabilities"], expected, atol=2e-6)
        assert answer["batch_norm"] == (batch_norm or "fastbn")
        assert 0 < answer["batch_norm_seconds"] < answer["network_seconds"] < 1


def test_the_environment_chooses_where_a_question_does_not():
    with load.serve("uvicorn", batch_norm="numpy") as (_, address):
        for wish, expected in [({}, "numpy"), ({"batch_norm": "fastbn"}, "fastbn")]:
            response = httpx.post(f"{address}/predict", json={"images": [BLANK]} | wish)
            assert response.json()["batch_norm"] == expected
        counted = samples(address)
    assert counted["batch_norm_seconds_count", "numpy"] == counted["batch_norm_seconds_count", "fastbn"] == 1


def test_a_senseless_batch_norm():
    command = [sys.executable, "-c", "import app"]
    environment = os.environ | {"BATCH_NORM": "torch"}
    done = subprocess.run(command, cwd=SERVICE, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: batch_norm must be 'fastbn' or 'numpy', got 'torch'\n")


def images_with(value):
    return {"images": [[[value, *BLANK[0][1:]], *BLANK[1:]]]}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 422, "Field required"),
        (b"{", 422, "JSON"),
        (b"[" * 100_000, 400, "parsing the body"),
        (b"\xff{}", 400, "parsing the body"),
        ([], 422, "valid dictionary"),
        ({}, 422, "body.images: Field required"),
        ({"images": [BLANK], "more": 1}, 422, "body.more: Extra inputs"),
        (
            {"images": [BLANK], "batch_norm": "torch"},
            422,
            "body.batch_norm: Input should be 'fastbn' or 'numpy'",
        ),
        ({"images": []}, 422, "at least 1 item"),
        ({"images": [BLANK] * 65}, 422, "at most 64 items"),
        ({"images": BLANK}, 422, "body.images.0.0: Input should be a valid list"),
        ({"images": [BLANK[1:]]}, 422, "at least 8 items"),
        ({"images": [[*BLANK[1:], BLANK[0][1:]]]}, 422, "body.images.0.7: List should have at least 8"),
        (images_with(-0.1), 422, "body.images.0.0.0: Input should be greater than or equal to 0"),
        (images_with(16.1), 422, "less than or equal to 16"),
        (images_with(None), 422, "valid number"),
        (images_with("1"), 422, "valid number"),
        (images_with(True), 422, "valid number"),
        (b'{"images": [[[NaN]]]}', 422, "finite number"),
        (b'{"images": [[[Infinity]]]}', 422, "finite number"),
        (b'{"images": [[[1e999]]]}', 422, "finite number"),
        (b'{"images": [[[' + b"9" * 10_000 + b"]]]}", 400, "parsing the body"),
    ],
)
def test_bad_input_is_refused_with_a_reason(service, body, status, reason):
    process, address = service
    workers = psutil.Process(process.pid).children()
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = httpx.post(f"{address}/predict", headers={"Content-Type": "application/json"}, **content)
    assert response.status_code == status, response.text
    assert reason in response.json()["detail"]
    assert len(response.content) < 300
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    assert set(workers) <= set(psutil.Process(process.pid).children())  # none died of it


def test_wrong_path_and_method(address):
    assert httpx.get(f"{address}/predict").status_code == 405
    assert httpx.get(f"{address}/nothing").status_code == 404


def streamed(size):
    """The same in pieces, so that no length is announced."""
    return (b" " * 4096 for _ in range(size // 4096))


@pytest.mark.parametrize("body", [lambda size: b" " * size, streamed], ids=["announced", "streamed"])
def test_body_too_large(address, body):
    headers = {"Content-Type": "application/json"}
    for size in (LIMIT + 4096, 40 * LIMIT):
        response = httpx.post(f"{address}/predict", content=body(size), headers=headers)
        assert response.status_code == 413
        assert response.json() == {"detail": f"the body is larger than {LIMIT} bytes"}
    response = httpx.post(f"{address}/predict", content=body(LIMIT), headers=headers)
    assert response.status_code == 422  # large enough for JSON, but of blanks only
    assert httpx.get(f"{address}/healthz").is_success


def test_no_redirect_to_the_host_that_a_client_named(address):
    for path in ("/healthz/", "/predict/", "/metrics/"):
        response = httpx.get(address + path, headers={"Host": "elsewhere.example"})
        assert response.status_code == 404
        assert "elsewhere" not in response.text + str(response.headers)


def connect(address):
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_to_the_end(client):
    received = b""
    while data := client.recv(1 << 16):
        received += data
    return received


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /nothing", b"404"),
        ("POST /healthz", b"405"),
        ("POST /predict", b"413"),
        ("GET /", b"200"),
        ("GET /metrics", b"200"),
    ],
)
@pytest.mark.parametrize("length", ["Content-Length: 209715200", "Transfer-Encoding: chunked"])
def test_the_rest_of_a_body_that_nobody_reads_is_not_taken(address, request_line, status, length):
    piece = b" " * (1 << 20)
    if "chunked" in length:
        piece = b"100000\r\n" + piece + b"\r\n"
    sent = 0
    with connect(address) as client:
        client.sendall(f"{request_line} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        try:
            while sent < 200:  # MiB
                client.sendall(piece)
                sent += 1
        except ConnectionError:
            pass
        assert sent < 64  # what the kernels of both sides keep
        head = read_to_the_end(client).partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 " + status)
    assert b"connection: close" in head.splitlines()
    assert httpx.get(f"{address}/healthz").is_success


def test_a_connection_is_kept_after_a_body_that_was_read(address):
    with httpx.Client() as client:
        for body, status in [({"images": [BLANK]}, 200), ({}, 422), ({"images": [BLANK]}, 200)]:
            response = client.post(f"{address}/predict", json=body)
            assert response.status_code == status
            assert "connection" not in response.headers


def test_a_request_in_pieces(address):
    content = b'{"images": [%s]}' % str(BLANK).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    whole = b"\r\n" + head + b"Content-Length: %d\r\n\r\n" % len(content) + content
    with connect(address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(whole), 40):
            client.sendall(whole[i : i + 40])
            time.sleep(0.02)
        assert read_to_the_end(client).startswith(b"HTTP/1.1 200")


def test_a_head_without_an_end(address):
    """It would take all memory within the time that a head has."""
    with connect(address) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 60_000 + b"\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    with connect(address) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(ConnectionError):
            client.sendall((b"X: " + b"x" * (1 << 20) + b"\r\n") * 200)
        assert read_to_the_end(client).startswith(b"HTTP/1.1 431 ")


@pytest.fixture(scope="module", params=["gunicorn", "uvicorn"])
def hasty_address(request):
    """Of a service that waits for one second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("READ_SECONDS", "1")
        with load.serve(request.param) as (_, address):
            yield address


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SLOW = {  # (what is sent at once, what is sent again and again, beginnings of the answers)
    "nothing": (b"", b"", []),
    "no head": (b"\r\n", b"\r\n", [b"408 Request Timeout"]),
    "half a line": (b"POST /pre", b"", [b"408 Request Timeout"]),
    "half a head": (POST, b"X: x\r\n", [b"408 Request Timeout"]),
    "half a value": (POST + b"X: ", b"x", [b"408 Request Timeout"]),
    "half a body": (POST + b"Content-Length: 1000\r\n\r\n{", b" ", [b"408 Request Timeout"]),
    "no body": (POST + b"Content-Length: 1000\r\n\r\n", b"", [b"408 Request Timeout"]),
    "half a chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n8\r\n{", b"", [b"408 Request Timeout"]),
    "chunks": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n", [b"408 Request Timeout"]
    ),
    "half a second head": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + POST, b"X: x\r\n", [b"200 OK", b"408 Request Timeout"]
    ),
    "half a second body": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + POST + b"Content-Length: 1000\r\n\r\n", b" ",
        [b"200 OK", b"408 Request Timeout"],
    ),
}  # fmt: skip


def dawdle(address, start, more):
    """(seconds until the connection was closed, what was received) by a client that is never idle long."""
    began, received = time.monotonic(), b""
    with connect(address) as client:
        client.sendall(start)
        client.settimeout(0.1)
        while time.monotonic() < began + 30:
            try:
                data = client.recv(1 << 16)
                if not data:
                    break
                received += data
            except TimeoutError:
                client.sendall(more)
            except ConnectionError:
                break
        else:
            raise AssertionError(f"the connection is still open; received: {received}")
    return time.monotonic() - began, received


def test_clients_that_send_half_a_request_are_sent_away(hasty_address):
    with ThreadPoolExecutor(2 * len(SLOW)) as pool:
        clients = [
            (name, answers, pool.submit(dawdle, hasty_address, start, more))
            for name, (start, more, answers) in SLOW.items()
            for _ in range(2)
        ]
        while not all(client.done() for _, _, client in clients):  # the others go on
            assert httpx.get(f"{hasty_address}/healthz").is_success
            assert httpx.post(f"{hasty_address}/predict", json={"images": [BLANK]}).is_success
    for name, answers, client in clients:
        seconds, received = client.result()
        assert seconds >= 0.9, name
        found = received.split(b"HTTP/1.1 ")[1:]
        assert len(found) == len(answers), (name, received)
        for each, expected in zip(found, answers, strict=True):
            assert each.startswith(expected), (name, received)
        if "body" in name or "chunk" in name:
            assert b'{"detail":"the body did not come within 1 seconds"}' in received
        if answers:
            assert b"connection: close" in found[-1]


def test_time_begins_anew_with_each_request(hasty_address):
    connection = http.client.HTTPConnection(hasty_address.removeprefix("http://"))
    connection.connect()
    used = connection.sock
    for _ in range(4):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        time.sleep(0.4)
    assert connection.sock is used
    connection.close()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_senseless_time(seconds):
    command = [sys.executable, "-c", "import protocol"]
    environment = os.environ | {"READ_SECONDS": seconds}
    done = subprocess.run(command, cwd=SERVICE, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert seconds in done.stderr.splitlines()[-1]
    assert "READ_SECONDS" in done.stderr


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ("0", "WEB_CONCURRENCY, the number of workers, must be at least 1, got 0; unset, it is 2"),
        ("-1", "Error: Value must be positive: -1"),  # by gunicorn itself
    ],
)
def test_no_workers(count, message, tmp_path):
    environment = os.environ | {"WEB_CONCURRENCY": count, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0"]
    done = subprocess.run(command, cwd=SERVICE, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == message
    assert not list(tmp_path.iterdir())


def test_most_images_fit_in_a_body(address):
    pixel = 1.2345678901234567
    response = httpx.post(f"{address}/predict", json={"images": [[[pixel] * 8] * 8] * 64})
    assert response.status_code == 200


def samples(address):
    """The values of GET /metrics by name and labels."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return {
        (sample.name, *(label for _, label in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_the_requests_of_all_workers(address):
    latency = "http_request_duration_seconds"
    before = samples(address)
    for _ in range(20):  # each on a connection of its own, which any worker may take
        assert httpx.post(f"{address}/predict", json={"images": [BLANK]}).is_success
    for _ in range(5):
        after = samples(address)
        grown = {key: value - before.get(key, 0) for key, value in after.items()}
        assert grown[f"{latency}_count", "/predict", "POST"] == 20
        assert grown[f"{latency}_bucket", "/predict", "+Inf", "POST"] == 20
        assert grown["batch_norm_seconds_count", "fastbn"] == 20
        assert 0 < grown["batch_norm_seconds_sum", "fastbn"] < grown[f"{latency}_sum", "/predict", "POST"]
    assert (f"{latency}_bucket", "/predict", "0.01", "POST") in after


def two_workers(process):
    """The workers of gunicorn; one may answer before the other is there."""
    deadline = time.monotonic() + 10
    while len(workers := psutil.Process(process.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) == 2
    return workers


def test_killed_worker_costs_no_answer_of_others(data):
    if not shutil.which("wrk"):
        pytest.skip("wrk is not installed: no load")
    _, images, _, _ = data
    with load.serve() as (process, address):
        before = two_workers(process)
        run = load.load(
            address, images[:16], seconds=4, requests=100_000, halfway=lambda: load.kill_worker(process)
        )
        after = two_workers(process)
        # The mean stays readable, though a worker died with its files open.
        assert load.batch_norm_microseconds(address) > 0
    assert run["answers"] > 100
    assert run["server_errors"] == run["wrong"] == 0
    assert run["connection_errors"] <= 8  # those which the killed worker held
    assert len(set(after) & set(before)) == 1


def test_wrong_answers_and_server_errors_are_counted(data, monkeypatch):
    """That the load finds nothing wrong says something only if it would."""
    if not shutil.which("wrk"):
        pytest.skip("wrk is not installed: no load")
    _, images, _, labels = data
    zeros = np.eye(1, 10)
    monkeypatch.setattr(network, "load", lambda name: lambda images: (zeros.repeat(len(images), 0), 0))
    with load.serve("uvicorn") as (_, address):
        run = load.load(address, images[labels > 0][:1], seconds=2, requests=50, connections=8)
    assert run["wrong"] == run["answers"]
    assert 50 <= run["answers"] < 50 + 8  # bounded, but for answers that are under way


def test_gunicorn_preloads_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with load.serve() as (process, _):
        workers = two_workers(process)
        loaded = [Path(mapped.path).name for mapped in psutil.Process(process.pid).memory_maps()]
        assert any(name.startswith("_kernels") for name in loaded)  # before the workers were forked
        assert list(tmp_path.glob("fastbn-metrics-*/*.db"))
    assert process.returncode == 0
    assert not any(worker.is_running() for worker in workers)
    assert not list(tmp_path.iterdir())


def test_totals_outlive_workers_and_their_files_do_not(tmp_path, monkeypatch):
    folder = tmp_path / "metrics"
    folder.mkdir()
    for name in ("counter_1.db", "gauge_liveall_1.db", "notes.txt"):
        (folder / name).write_text("of an earlier run, and no metrics")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    seen = []  # totals of both
    keys = ("http_request_duration_seconds_count", "/predict", "POST"), ("batch_norm_seconds_count", "fastbn")

    def watch_until(address, happened):
        deadline = time.monotonic() + 20
        while not happened():
            assert time.monotonic() < deadline, seen[-1]
            found = samples(address)
            seen.append([found.get(key, 0) for key in keys])

    with load.serve() as (process, address):
        for deaths in range(1, 5):
            for _ in range(5):
                assert httpx.post(f"{address}/predict", json={"images": [BLANK]}).is_success
            watch_until(address, lambda: seen and seen[-1] == [5 * deaths] * 2)  # noqa: B023
            dying = two_workers(process)[0]
            dying.kill()
            psutil.wait_procs([dying], timeout=10)
            watch_until(address, lambda: not list(folder.glob(f"*_{dying.pid}.db")))  # noqa: B023
            two_workers(process)
            watch_until(address, lambda: seen[-1] == [5 * deaths] * 2)  # noqa: B023
        living = {process.pid, *(worker.pid for worker in two_workers(process))}
        owners = {file.stem.rpartition("_")[2] for file in folder.glob("*.db")}
        assert owners <= {str(pid) for pid in living} | {"dead"}
    for totals in zip(*seen, strict=True):
        assert list(totals) == sorted(totals)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    """Files of two processes, 7 and 8."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for process in 7, 8:
        for kind in "counter", "histogram", "gauge_all", "gauge_liveall":
            with closing(MmapedDict(tmp_path / f"{kind}_{process}.db")) as file:
                file.write_value("both", process, 1)
                file.write_value(f"of {process}", 1, 1)
    (tmp_path / "summary_7.db").touch()  # killed before it was filled
    return tmp_path


def test_what_the_dead_have_counted(metrics):
    metric_files.inherit(7)
    left = {f"{kind}_8.db" for kind in ("counter", "histogram", "gauge_all", "gauge_liveall")}
    dead = {"counter_dead.db", "histogram_dead.db"}
    assert {file.name for file in metrics.glob("*.db")} == left | dead
    metric_files.inherit(8)
    assert {file.name for file in metrics.glob("*.db")} == dead
    for name in dead:
        values = {key: value for key, value, _, _ in MmapedDict.read_all_values_from_file(metrics / name)}
        assert values == {"both": 15, "of 7": 1, "of 8": 1}
    metric_files.remove()
    assert not list(metrics.iterdir())


def test_a_reader_that_hangs_does_not_hang_the_master(metrics):
    before = {file.name: file.read_bytes() for file in metrics.glob("*.db")}
    reading = metric_files.hold()
    next(reading)
    metric_files.inherit(7)
    assert {file.name: file.read_bytes() for file in metrics.glob("*.db")} == before
    reading.close()
    metric_files.inherit(7)
    assert not list(metrics.glob("*_7.db"))


def test_a_reader_waits_while_files_change(metrics):
    with open(metrics / "lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reader = pool.submit(next, metric_files.hold())
        time.sleep(0.2)
        assert not reader.done()
        fcntl.flock(lock, fcntl.LOCK_UN)
        reader.result(10)


# ---- the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed: the page is not tested")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    for option in ("headless", "no-sandbox", "disable-dev-shm-usage", "disable-sync", *quiet.split()):
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def arc(x, y, width, height, start=0, end=360):
    """Points of an ellipse, clockwise from `start` degrees past noon."""
    angles = np.radians(np.linspace(start, end, 24))
    return [(round(x + width * np.sin(a)), round(y - height * np.cos(a))) for a in angles]


DIGITS = [  # each in one stroke, from the middle of the canvas
    arc(0, 0, 60, 90),
    [(-45, -40), (10, -95), (10, 95)],
    [*arc(0, -50, 50, 45, -80, 120), (-50, 90), (60, 90)],
    [*arc(0, -48, 45, 45, -70, 180), *arc(0, 45, 50, 48, 0, 250)],
    [(-10, -95), (-60, 20), (60, 20), (30, 20), (30, -40), (30, 95)],
    [(55, -90), (-40, -90), (-45, -10), *arc(0, 35, 50, 55, -40, 240)],
    [(20, -95), (-45, 10), *arc(0, 45, 48, 48, -90, 270)],
    [(-60, -90), (60, -90), (0, 95)],
    [*arc(0, -45, 42, 45, 180, 540), *arc(0, 48, 48, 46, 0, 360)],
    [*arc(0, -45, 48, 48, 90, 450), (35, 95)],
]


def draw(browser, stroke):
    canvas = browser.find_element(By.ID, "drawing")
    pen = ActionChains(browser, duration=5).move_to_element_with_offset(canvas, *stroke[0]).click_and_hold()
    for x, y in stroke[1:]:
        pen.move_to_element_with_offset(canvas, x, y)
    pen.release().perform()


def text(browser, name):
    return browser.find_element(By.ID, name).text


def seconds(browser, name):
    value, unit = text(browser, name).split()
    return float(value) * {"µs": 1e-6, "ms": 1e-3}[unit]


@pytest.mark.parametrize("digit", range(10))
def test_page_reads_a_drawn_digit(browser, address, digit):
    browser.get(address)
    draw(browser, DIGITS[digit])
    WebDriverWait(browser, 10).until(lambda browser: text(browser, "answer"))
    assert text(browser, "answer") == str(digit)
    rows = browser.find_elements(By.CSS_SELECTOR, "#probabilities tr")
    shares = [float(row.text.split()[1]) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares.index(max(shares)) == digit
    meter = rows[digit].find_element(By.TAG_NAME, "meter")
    assert 100 * float(meter.get_property("value")) == pytest.approx(max(shares), abs=0.1)
    WebDriverWait(browser, 30).until(lambda browser: "Medians of 15 requests" in text(browser, "count"))
    for by in "fastbn", "numpy":
        norm, network, request = (seconds(browser, f"{by}-{name}") for name in ("norm", "network", "request"))
        assert 0 < norm < network < request < 1
    browser.find_element(By.ID, "clear").click()
    assert text(browser, "answer") == ""
    assert text(browser, "fastbn-norm") == text(browser, "numpy-request") == "\N{EN DASH}"
    assert not browser.get_log("browser")


def test_page_fits_on_a_phone(browser, address):
    """Where to draw, what is read and both bars, without scrolling."""
    phone = {"width": 360, "height": 600, "deviceScaleFactor": 3, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.get(address)
        draw(browser, DIGITS[3])  # the canvas is smaller here than what is drawn on
        WebDriverWait(browser, 30).until(lambda browser: "Medians of 15 requests" in text(browser, "count"))
        assert text(browser, "answer") == "3"
        edges = "const edges = document.getElementById(arguments[0]).getBoundingClientRect();"
        for name in "drawing", "answer", "clear", "fastbn-bar", "numpy-bar":
            right, bottom = browser.execute_script(edges + "return [edges.right, edges.bottom]", name)
            assert 0 < right <= 360, name
            assert 0 < bottom <= 600, name
        assert browser.execute_script("return [scrollX, scrollY, document.body.scrollWidth]") == [0, 0, 360]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bars_are_as_long_as_what_they_tell(browser, address):
    browser.get(address)
    draw(browser, DIGITS[7])
    WebDriverWait(browser, 30).until(lambda browser: "Medians of 15 requests" in text(browser, "count"))
    width = "return document.querySelector(arguments[0]).getBoundingClientRect().width"
    whole = {by: seconds(browser, f"{by}-network") for by in ("fastbn", "numpy")}
    for by in whole:
        full, norm, rest = (
            browser.execute_script(width, f"#{by}-bar {part}".strip()) for part in ("", ".norm", ".rest")
        )
        assert (norm + rest) / full == pytest.approx(whole[by] / max(whole.values()), abs=0.02)
        assert norm / full == pytest.approx(seconds(browser, f"{by}-norm") / max(whole.values()), abs=0.02)


def test_page_says_when_there_is_no_answer(browser):
    with load.serve("uvicorn") as (_, address):
        browser.get(address)
    draw(browser, DIGITS[1])
    WebDriverWait(browser, 10).until(lambda browser: text(browser, "problem"))
    assert text(browser, "problem").startswith("No answer: ")
    assert text(browser, "answer") == ""
    browser.get_log("browser")
