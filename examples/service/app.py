"""A service that reads digits: the network of network.py behind FastAPI.

POST /predict takes images and answers with digits, GET / is a page to draw one, GET /healthz says that the
service lives, GET /metrics tells Prometheus about latencies. A question may say whether fastbn or NumPy is to
do its batch norms; where it does not, the environment variable BATCH_NORM does, and without that fastbn does
them. From this folder, with workers and without:

    gunicorn
    uvicorn app:app --http protocol:Protocol
"""

import math
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import anyio
import metric_files
import network
import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import Histogram
from prometheus_fastapi_instrumentator import Instrumentator
from protocol import READ_SECONDS
from pydantic import BaseModel, ConfigDict, Field
from threadpoolctl import threadpool_limits

import fastbn
from fastbn.typing import Array

Library = Literal["fastbn", "numpy"]
Message = dict[str, Any]  # of ASGI, as are these
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_IMAGES = 64
MAX_BODY = 256 * 1024  # bytes; MAX_IMAGES written with eight digits and spaces are half of it

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)  # seconds
BATCH_NORM_SECONDS = Histogram(
    "batch_norm_seconds",
    "Seconds that a request spent in batch norm and ReLU",
    ["by"],
    buckets=(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
)

# The network twice; `load` refuses a BATCH_NORM that it does not know.
BATCH_NORM = os.environ.get("BATCH_NORM", "fastbn")
networks = {name: network.load(name) for name in (BATCH_NORM, *network.NORMS)}

Pixel = Annotated[float, Field(strict=True, ge=0, le=16, allow_inf_nan=False)]
Row = Annotated[list[Pixel], Field(min_length=8, max_length=8)]
Image = Annotated[list[Row], Field(min_length=8, max_length=8)]
Images = Annotated[list[Image], Field(min_length=1, max_length=MAX_IMAGES)]


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    images: Images
    batch_norm: Library = Field(BATCH_NORM)


class Answer(BaseModel):
    digits: list[int]
    probabilities: list[list[float]]
    batch_norm: str
    batch_norm_seconds: float
    network_seconds: float  # batch norm included


class BodyLimit:
    """ASGI middleware: an end to bodies, whatever length they announced.

    413 as soon as one has grown too large, 408 if it takes too long. And after an answer that did not wait
    for the body, such as 404, the connection is closed: what is left of the body is not read.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        received, deadline = 0, anyio.current_time() + READ_SECONDS

        async def limited_receive() -> Message:
            nonlocal received, unread
            with anyio.CancelScope(deadline=deadline if unread else math.inf) as waiting:
                message = await receive()
            if waiting.cancelled_caught:
                raise HTTPException(408, f"the body did not come within {READ_SECONDS:g} seconds")
            unread = message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes")
            return message

        async def closing_send(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, limited_receive, closing_send)


# One thread per request and one request at a time: the workers are what keeps the CPUs busy.
fastbn.set_num_threads(1)
threadpool_limits(limits=1, user_api="blas")
one_at_a_time = anyio.CapacityLimiter(1)

app = FastAPI(title="Digits by fastbn", redirect_slashes=False)  # or to whatever Host the client names
app.add_middleware(BodyLimit)
instrumentator = Instrumentator(excluded_handlers=["/metrics"]).instrument(app, latency_lowr_buckets=BUCKETS)
instrumentator.expose(app, dependencies=[Depends(metric_files.hold, scope="function")])


@app.exception_handler(RequestValidationError)
async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong, and where. (The whole list may be long, and holds NaN, not JSON.)"""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)


def read(question: Question) -> tuple[Array, float, float]:
    """Probabilities, and the seconds of batch norm and of the whole network."""
    images = np.array(question.images, np.float32)
    start = perf_counter()
    probabilities, seconds = networks[question.batch_norm](images)
    return probabilities, seconds, perf_counter() - start


@app.post("/predict")
async def predict(question: Question) -> Answer:
    probabilities, batch_norm, whole = await anyio.to_thread.run_sync(read, question, limiter=one_at_a_time)
    BATCH_NORM_SECONDS.labels(question.batch_norm).observe(batch_norm)
    return Answer(
        digits=probabilities.argmax(1).tolist(),
        probabilities=probabilities.tolist(),
        batch_norm=question.batch_norm,
        batch_norm_seconds=batch_norm,
        network_seconds=whole,
    )


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("index.html"))
