"""Imitates Google Cloud Storage on this machine: buckets in memory behind its JSON API.

array_record, tensorstore and google-cloud-storage have settings for emulators, which point to this
server. TensorFlow has no such setting; it uses this server as a proxy, which answers as
www.googleapis.com and storage.googleapis.com, with a temporary certificate.
"""

import contextlib
import http.server
import json
import re
import ssl
import subprocess
import threading
import urllib.parse


class FakeGcs:
    """Runs the server while it is entered as a context manager.

    Attributes:
      objects: contents by "bucket/name"; tests may change them.
      requests: (method, path with query) of every request so far.
      denied: names ("bucket/name") for which the server answers 403.
      environment: environment variables with which a process uses this server.

    Args:
      folder: folder for the certificate.
    """

    def __init__(self, folder):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, bytearray] = {}
        self.requests: list[tuple[str, str]] = []
        self.denied: set[str] = set()
        self.lock = threading.Lock()
        certificate, key = folder / "certificate.pem", folder / "key.pem"
        _write_certificate(certificate, key)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.gcs = self
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage
            "GOOGLE_CLOUD_PROJECT": "test",
            "https_proxy": url,  # TensorFlow
            "CURL_CA_BUNDLE": str(certificate),
            "NO_GCE_CHECK": "true",
            "GCS_RETRY_CONFIG_MAX_RETRIES": "0",
            "GCS_STAT_CACHE_MAX_AGE": "0",
        }

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, data: bytes) -> None:
        """Store an object."""
        self.objects[name] = bytes(data)
        self.generations[name] = self.generations.get(name, 0) + 1

    def upload_folder(self, folder, prefix: str) -> None:
        """Store every file of a local folder under `prefix`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def _write_certificate(certificate, key) -> None:
    """Write a self-signed certificate and its key."""
    names = "DNS:www.googleapis.com,DNS:storage.googleapis.com"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    names = ["-subj", "/CN=fake", "-addext", f"subjectAltName={names}"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client may close the connection early
            super().handle()

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.gcs.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.close_connection = False

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def _answer(self) -> None:
        """Dispatch a request by its path."""
        gcs = self.server.gcs
        gcs.requests.append((self.command, self.path))
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self._read_body()
        path = url.path.removeprefix("/upload").removeprefix("/storage/v1")
        with gcs.lock:
            if self.headers["Host"] == "storage.googleapis.com":
                self._send_object(urllib.parse.unquote(path[1:]))
            elif match := re.fullmatch(r"/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", path):
                b, name, to_b, to_name = map(urllib.parse.unquote, match.groups())
                self._rewrite(f"{b}/{name}", f"{to_b}/{to_name}")
            elif match := re.fullmatch(r"/b/([^/]+)/o/([^/]+)", path):
                self._handle_object("/".join(map(urllib.parse.unquote, match.groups())))
            elif match := re.fullmatch(r"/b/([^/]+)/o", path):
                self._list_or_upload(match[1])
            elif match := re.fullmatch(r"/b/([^/]+)", path):
                self._send_json({"kind": "storage#bucket", "name": match[1]})
            elif match := re.fullmatch(r"/b/([^/]+)/storageLayout", path):
                self._send_json({"kind": "storage#storageLayout", "bucket": match[1]})
            elif match := re.fullmatch(r"/session/(.*)", path):
                self._upload_part(urllib.parse.unquote(match[1]))
            else:
                self._send_json(
                    {"error": {"code": 501, "message": "not supported by the fake"}}, 501
                )

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _handle_object(self, name: str) -> None:
        """Answer a request for the content or the metadata of an object, or delete it."""
        gcs = self.server.gcs
        if name not in gcs.objects or name in gcs.denied:
            self._send_object(name)
        elif self.command == "DELETE":
            del gcs.objects[name]
            self._send(204, b"")
        elif self.query.get("alt") == "media":
            self._send_object(name)
        else:
            self._send_json(self._resource(name))

    def _send_object(self, name: str) -> None:
        """Send the requested range of an object, or an error."""
        gcs = self.server.gcs
        if name in gcs.denied:
            return self._send_json({"error": {"code": 403, "message": f"no access to {name}"}}, 403)
        if name not in gcs.objects:
            return self._send_json(
                {"error": {"code": 404, "message": f"no such object {name}"}}, 404
            )
        data = gcs.objects[name]
        headers = {"x-goog-generation": str(gcs.generations[name])}
        headers["x-goog-stored-content-length"] = str(len(data))
        byte_range = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not byte_range:
            return self._send(200, data, headers)
        first, last = byte_range.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= end:
            return self._send(416, b"", headers)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return self._send(206, data[start:end], headers)

    def _list_or_upload(self, bucket: str) -> None:
        """List a bucket (GET), or begin or perform an upload (POST)."""
        if self.command == "POST":
            name = f"{bucket}/{self.query['name']}"
            if self.query.get("uploadType") == "resumable":
                self.server.gcs.uploads[name] = bytearray()
                host = self.headers["Host"]
                scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
                location = f"{scheme}://{host}/session/{urllib.parse.quote(name, safe='')}"
                return self._send(200, b"", {"Location": location})
            return self._store(name, self.body)
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], set()
        for full in sorted(self.server.gcs.objects):
            name = full.removeprefix(f"{bucket}/")
            if name == full or not name.startswith(prefix) or name < first:
                continue
            if end and name >= end:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._resource(full))
        return self._send_json({"items": items, "prefixes": sorted(prefixes)})

    def _upload_part(self, name: str) -> None:
        self.server.gcs.uploads[name] += self.body
        return self._store(name, bytes(self.server.gcs.uploads.pop(name)))

    def _store(self, name: str, data: bytes) -> None:
        """Store an object, unless the client expects another generation of it."""
        expected = self.query.get("ifGenerationMatch")
        current = self.server.gcs.generations[name] if name in self.server.gcs.objects else 0
        if expected is not None and int(expected) != current:
            return self._send_json({"error": {"code": 412, "message": "generation differs"}}, 412)
        self.server.gcs.put(name, data)
        return self._send_json(self._resource(name))

    def _rewrite(self, name: str, to: str) -> None:
        """Copy an object."""
        if name not in self.server.gcs.objects:
            return self._send_object(name)
        self.server.gcs.put(to, self.server.gcs.objects[name])
        return self._send_json({"done": True, "resource": self._resource(to)})

    def _resource(self, name: str) -> dict:
        """Return the metadata of an object."""
        bucket, _, key = name.partition("/")
        data = self.server.gcs.objects[name]
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(self.server.gcs.generations[name]),
            "metageneration": "1",
            "updated": "2024-01-01T00:00:00.000Z",
            "timeCreated": "2024-01-01T00:00:00.000Z",
        }

    def _send_json(self, value: dict, status: int = 200) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(value).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
