"""Tags of single documents over HTTP, by Ray Serve: an application that is built of a bundle.

    serve run xmc_ray.serve:app bundle=s3://shop/bundle

``POST /tag`` takes ``{"texts": [...], "k": 5}`` and answers with the best labels of each text, in their order; ``GET /health``
says which bundle answers. Requests that wait at the same time are predicted together. What a request has wrong is a line with
status 400 or 422; what the model has wrong, with 500. For catalogues there are nights, which lose no row.
"""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, cast

import pyarrow.compute as pc
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

from xmc_ray.bundle.members import Members
from xmc_ray.errors import ConfigError, DataError, XmcError

if TYPE_CHECKING:
    from xmc_ray.classifier import XMCClassifier

_web = FastAPI(title="xmc_ray", docs_url=None, redoc_url=None)  # the pages of both come from elsewhere
_TOLD = 3  # things that a request has wrong


class ServeConfig(BaseModel, extra="forbid"):
    """What ``serve run xmc_ray.serve:app name=value`` sets."""

    bundle: str
    """Bundle folder, local or s3://; several, with commas between, are an ensemble."""
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    """The most labels that a request may ask for."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads that a replica computes with."""
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Processes that hold the model."""
    gpu: bool = False
    """Give each replica a GPU."""
    batch: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests that are predicted together, at most."""
    wait: Annotated[float, Field(ge=0, le=1)] = 0.002
    """Seconds to wait for others to predict together with."""


Text = Annotated[str, Field(max_length=1_000_000)]  # about as in a night, see documents.max_bytes


class Request(BaseModel, extra="forbid"):
    """The body of ``POST /tag``."""

    texts: Annotated[list[Text | dict[str, Text | None]], Field(max_length=1000)]
    """Documents: texts, or a mapping of its fields each for a model with fields; none with more than a million characters."""
    k: Annotated[int, Field(ge=1)] | None = None
    """Labels of each; without it, as many as the service gives."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The least score of a label."""


class Tag(BaseModel):
    """A label of a document."""

    label: str
    name: str | None
    score: float


@_web.exception_handler(RequestValidationError)
async def refused(_: object, error: RequestValidationError) -> JSONResponse:
    """One line, without what was sent: the answer may not be able to hold it, such as NaN and halves of letters."""
    told = []
    for one in error.errors():
        place = ".".join(str(part) for part in one["loc"] if isinstance(part, int) or part in Request.model_fields)
        told.append(f"{place}: {one['msg']}" if place else one["msg"])
    rest = f"; {len(told) - _TOLD:,} more" if len(told) > _TOLD else ""
    return JSONResponse({"detail": f"the request is not as expected: {'; '.join(told[:_TOLD])}{rest}"}, 422)


class Answer(BaseModel):
    """``tags``: those of each text, best first. ``model``: the fingerprint of what has found them."""

    model: str
    tags: list[list[Tag]]


def opened(config: ServeConfig, members: Members) -> "XMCClassifier":
    """The model of a replica. ModelError if another lies there by now: all replicas of an application answer alike."""
    import torch  # here, and not where the application is built

    from xmc_ray.bundle.ensemble import Ensemble
    from xmc_ray.classifier import XMCClassifier

    torch.set_num_threads(config.threads)
    return XMCClassifier(Ensemble.load(members).to("cuda" if config.gpu else "cpu"))


@serve.deployment
@serve.ingress(_web)
class Tagging:
    """A replica, which holds the model."""

    def __init__(self, config: ServeConfig, members: Members) -> None:
        self.config, self.members = config, members
        self.classifier = opened(config, members)
        index = self.classifier.ensemble.labels
        named = pc.is_valid(index.names)  # the others take no memory
        self.names = dict(zip(index.labels.filter(named).to_pylist(), index.names.filter(named).to_pylist(), strict=True))
        together: Any = self.together  # Serve's decorator makes it more than a method
        together.set_max_batch_size(config.batch)
        together.set_batch_wait_timeout_s(config.wait)

    @_web.get("/health")
    def health(self) -> dict[str, Any]:
        """Which model answers."""
        labels = len(self.classifier.ensemble.labels)
        return {"model": self.members.fingerprint, "bundle": self.members.uris, "labels": labels}

    @_web.post("/tag")
    async def tag(self, request: Request) -> Answer:
        """The labels of each text."""
        k = request.k or self.config.k
        if k > self.config.k:
            raise HTTPException(400, f"k is above that of this service; found {k}; expected at most {self.config.k}")
        found = await self.together(request.texts)
        if isinstance(found, XmcError):
            raise HTTPException(400 if isinstance(found, ConfigError | DataError) else 500, str(found))
        tags = [[self._tag(label, score) for label, score in one[:k] if score >= request.min_score] for one in found]
        return Answer(model=self.members.fingerprint, tags=tags)

    def _tag(self, label: str, score: float) -> Tag:
        return Tag(label=label, name=self.names.get(label), score=score)

    @serve.batch
    async def together(self, requests: list[list[Any]]) -> list[Any]:
        """The best labels of the texts of all requests; of one that cannot be read, the error."""
        try:
            return await asyncio.to_thread(self._predicted, requests)
        except XmcError:  # one of them spoils it for all: each by itself
            return [await asyncio.to_thread(self._alone, texts) for texts in requests]

    def _predicted(self, requests: list[list[Any]]) -> list[Any]:
        texts = [text for request in requests for text in request]
        tags, start, answers = self.classifier.predict(texts, self.config.k) if texts else [], 0, []
        for request in requests:
            answers.append(tags[start : start + len(request)])
            start += len(request)
        return answers

    def _alone(self, texts: list[Any]) -> Any:
        try:
            return self._predicted([texts])[0]
        except XmcError as error:
            return error


def app(config: ServeConfig) -> Application:
    """The application of the bundle that is there now, for `serve run`; raises what `Members.read` raises."""
    members = Members.read(config.bundle.split(","))
    options: dict[str, Any] = {"num_replicas": config.replicas, "max_ongoing_requests": 4 * config.batch}
    options |= {"ray_actor_options": {"num_cpus": config.threads, "num_gpus": 1 if config.gpu else 0}}
    options |= {"logging_config": {"enable_access_log": False}}  # a line a request costs more than many a document
    application: Application = cast(Any, Tagging).options(**options).bind(config, members)
    return application
