"""The service of examples/service: its network, its answers by gunicorn and uvicorn, its page in a browser.

`make test-service` runs this, and installs what it needs.
"""

import shutil
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy.signal import correlate
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

SERVICE = Path(__file__).resolve().parents[2] / "examples" / "service"
sys.path.append(str(SERVICE))
import load
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
    for image, result in zip(padded, network.conv2d(x, weight), strict=True):
        for feature in range(4):
            expected = correlate(image, weight[feature].transpose(1, 2, 0), "valid")[..., 0]
            np.testing.assert_allclose(result[..., feature], expected)


def test_gradients_are_those_of_the_loss(data):
    """By central differences: along the gradient of a parameter the slope is the gradient's length."""
    images, _, labels, _ = data
    images, labels = images[:200], labels[:200]
    learner = train.TrainedNetwork(np.random.default_rng(0))

    def loss():
        return -np.log(learner.forward(images)[np.arange(200), labels]).mean()

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


def test_unknown_batch_norm_is_an_error():
    with pytest.raises(ValueError, match="must be 'fastbn' or 'numpy', got 'torch'"):
        network.load("torch")


# ---- the service


def test_answers_are_those_of_the_numpy_network(address, data):
    _, images, _, _ = data
    numpy_network = network.load("numpy")
    for start in range(0, len(images), 64):
        batch = images[start : start + 64]
        response = httpx.post(f"{address}/predict", json={"images": batch.tolist()})
        assert response.status_code == 200
        answer = response.json()
        expected, _ = numpy_network(batch)
        assert answer["digits"] == expected.argmax(1).tolist()
        np.testing.assert_allclose(answer["probabilities"], expected, atol=2e-6)
        assert 0 < answer["batch_norm_seconds"] < 1


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
        assert grown["batch_norm_seconds_count",] == 20
        assert 0 < grown["batch_norm_seconds_sum",] < grown[f"{latency}_sum", "/predict", "POST"]
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
    _, images, _, _ = data
    zeros = np.eye(1, 10)
    monkeypatch.setattr(network, "load", lambda name: lambda images: (zeros.repeat(len(images), 0), 0))
    with load.serve("uvicorn") as (_, address):
        run = load.load(address, images[:16], seconds=2, requests=50, connections=8)
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
    microseconds, unit = text(browser, "time").split()
    assert 0 < float(microseconds) < 1e6
    assert unit == "µs"
    browser.find_element(By.ID, "clear").click()
    assert text(browser, "answer") == ""
    assert not browser.get_log("browser")


def test_page_says_when_there_is_no_answer(browser):
    with load.serve("uvicorn") as (_, address):
        browser.get(address)
    draw(browser, DIGITS[1])
    WebDriverWait(browser, 10).until(lambda browser: text(browser, "problem"))
    assert text(browser, "problem").startswith("No answer: ")
    assert text(browser, "answer") == ""
    browser.get_log("browser")
