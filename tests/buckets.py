"""Buckets without a network: emulators of gs:// and s3://, and a proxy with faults.

    with buckets.serve("gs") as address: ...   # gs://bkt, of this process
    buckets.gs_bucket, buckets.s3_bucket       # pytest fixtures: an empty folder each

The servers run in threads of this process; child processes find them by the
environment, which `serve` sets. Where the emulators are not installed, tests skip.
"""

import contextlib
import http.server
import importlib
import importlib.util
import json
import logging
import os
import socket
import sys
import threading
import time
import urllib.request
import uuid
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from jaxtrain.storage.address import set_up

BUCKET = "bkt"
NEEDED = {
    "gs": ("gcsfs", "gcp_storage_emulator"),
    "s3": ("s3fs", "moto"),
}


def skip_unless_installed(scheme: str) -> None:
    """Skip the test where a library of this kind of bucket is not installed."""
    for library in NEEDED[scheme]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install 'jaxtrain[test]'")


@pytest.fixture
def gs_bucket() -> Iterator[str]:
    """The address of an empty folder in a bucket of gs://."""
    yield from _folder("gs")


@pytest.fixture
def s3_bucket() -> Iterator[str]:
    """The address of an empty folder in a bucket of s3://."""
    yield from _folder("s3")


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty folder, once in each kind of bucket."""
    yield from _folder(request.param)


def _folder(scheme: str) -> Iterator[str]:
    skip_unless_installed(scheme)
    with serve(scheme) as address:
        yield f"{address}/{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def serve(scheme: str, endpoint: str | None = None) -> Iterator[str]:
    """A bucket, with the environment that leads all libraries to it.

    Args:
        endpoint: where it is reached, if not at the emulator itself (a `Proxy`).
    """
    server = _server(scheme)
    environment = _environment(scheme, endpoint or server)
    with mock.patch.dict(os.environ, environment):
        _forget_connections()
        try:
            yield f"{scheme}://{BUCKET}"
        finally:
            _forget_connections()


def endpoint_of(scheme: str) -> str:
    """The URL of the emulator itself, started if need be."""
    return _server(scheme)


_SERVERS: dict[str, str] = {}


def _server(scheme: str) -> str:
    """The URL of this process's server of a kind; it lives as long as the process."""
    if scheme not in _SERVERS:
        _SERVERS[scheme] = {"gs": _start_gs, "s3": _start_s3}[scheme]()
    return _SERVERS[scheme]


def _environment(scheme: str, url: str) -> dict[str, str]:
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",  # nobody waits for a metadata server
            "GOOGLE_CLOUD_PROJECT": "test",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _forget_connections() -> None:
    """Let fsspec, etils and Orbax open new ones, under the environment of now."""
    from etils.epath import backend

    set_up()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    for library, name in (("gcsfs", "GCSFileSystem"), ("s3fs", "S3FileSystem")):
        if importlib.util.find_spec(library) is not None:
            getattr(importlib.import_module(library), name).clear_instance_cache()
    with contextlib.suppress(ImportError, AttributeError):
        from orbax.checkpoint._src.path import gcs_utils

        gcs_utils.get_bucket.cache_clear()


def list_objects(scheme: str, prefix: str) -> list[str]:
    """The names of objects, asked of the emulator itself, by no library of ours."""
    if scheme == "gs":
        url = f"{_server(scheme)}/storage/v1/b/{BUCKET}/o?prefix={prefix}"
        with urllib.request.urlopen(url) as reply:
            return sorted(item["name"] for item in json.load(reply).get("items", []))
    url = f"{_server(scheme)}/{BUCKET}?list-type=2&prefix={prefix}"
    with urllib.request.urlopen(url) as reply:
        found = xml.etree.ElementTree.parse(reply).iter()
    return sorted(at.text or "" for at in found if at.tag.rpartition("}")[2] == "Key")


def read_object(scheme: str, name: str) -> bytes:
    """An object's content, asked of the emulator itself."""
    request = urllib.request.Request(f"{_server(scheme)}/{BUCKET}/{name}")
    request.add_header("Authorization", "AWS test:test")
    with urllib.request.urlopen(request) as reply:
        return reply.read()


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _start_gs() -> str:
    from gcp_storage_emulator import server

    for name in ("gcp_storage_emulator", "api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _add_preconditions()
    port = free_port()
    emulator = server.create_server(
        "127.0.0.1", port, in_memory=True, default_bucket=BUCKET
    )
    emulator._api.daemon = True  # so that this process can end
    emulator.start()
    return f"http://127.0.0.1:{port}"


def _add_preconditions() -> None:
    """Teach the emulator ifGenerationMatch and the header of an object's generation."""
    from http import HTTPStatus

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(storage, bucket: str, name: str) -> str:
        try:
            return str(storage.get_file_obj(bucket, name)["generation"])
        except NotFound:
            return "0"

    def guarded(handler: Callable) -> Callable:
        def handle(request, response, storage, *args, **kwargs):
            wanted = request.query.get("ifGenerationMatch", [None])[0]
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            if not name and isinstance(request.data, dict):
                name = request.data.get("meta", {}).get("name", "")
            bucket = request.params["bucket_name"]
            if wanted is not None and generation(storage, bucket, name) != wanted:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            handler(request, response, storage, *args, **kwargs)

        return handle

    def with_generation(handler: Callable) -> Callable:
        def handle(request, response, storage, *args, **kwargs):
            handler(request, response, storage, *args, **kwargs)
            place = request.params["bucket_name"], request.params["object_id"]
            response["X-Goog-Generation"] = generation(storage, *place)

        return handle

    download = with_generation(guarded(objects.download))
    changed = {
        objects.insert: guarded(objects.insert),
        objects.delete: guarded(objects.delete),
        objects.download: download,
    }
    objects.download = download
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = changed.get(handler, handler)


def _start_s3() -> str:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    served, turn = moto._server, threading.Lock()
    app = served.app

    def one_by_one(environ, start_response):
        with turn:  # its listing stumbles over what is deleted meanwhile
            return app(environ, start_response)

    served.app = one_by_one
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(
        urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
    ).close()
    return url


class Proxy(contextlib.AbstractContextManager["Proxy"]):
    """Stands before an emulator and does harm to requests.

    `fault` is asked for each request (method and path) and gives what happens to it:
    None (it passes), a number (the status of the reply), "cut" (the connection ends
    without a reply), or a float of seconds to wait before it passes.
    `refuses`: end every connection at once, as of a bucket that is gone.
    """

    def __init__(
        self, target: str, fault: Callable[[str, str], int | float | str | None]
    ) -> None:
        self.fault = fault
        self.refuses = False
        self.requests: list[tuple[str, str]] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # botocore waits for "100 Continue"

            def log_message(self, *_: object) -> None:
                pass

            def _handle(self) -> None:
                self.close_connection = True
                length = int(self.headers.get("Content-Length") or 0)
                body = self._body(length)
                proxy.requests.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
                if proxy.refuses or fault == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if isinstance(fault, float):
                    time.sleep(fault)
                elif isinstance(fault, int):
                    self._reply(fault, {}, b"")
                    return
                try:
                    reply = proxy.forward(target, self, body)
                except ConnectionAbortedError:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._reply(*reply)

            def _body(self, length: int) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(length)
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _reply(self, status: int, headers: dict, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Connection", "close")
                for name, value in headers.items():
                    self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(ConnectionError):  # a killed client
                        self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _handle

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = "http://{}:{}".format(*self._server.server_address)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @staticmethod
    def forward(target, handler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Ask the emulator itself."""
        import http.client
        import urllib.parse

        place = urllib.parse.urlsplit(target)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        headers = {
            name: value
            for name, value in handler.headers.items()
            if name.lower()
            not in ("transfer-encoding", "content-length", "connection", "expect")
        }
        connection.request(handler.command, handler.path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        kept = {
            name: value
            for name, value in reply.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "date", "server")
            and (name.lower() != "content-length" or handler.command == "HEAD")
        }
        connection.close()
        return reply.status, kept, content

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def main() -> None:
    """Serve a kind of bucket until stdin ends; the URL is printed."""
    print(_server(sys.argv[1]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
