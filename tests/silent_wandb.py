"""As much of a W&B server as a run needs; from a chosen moment it accepts and says nothing."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def wandb_server(silent=None):
    """A server on this machine, in threads of its own.

    `silent` is "at once", "once a run has started", or None for a healthy one.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.silence = silent
    server.silent = silent == "at once"
    server.over = threading.Event()
    server.received = []  # bodies
    server.handle_error = lambda *_: None  # a client that has gone
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def environment(server):
    """What sends wandb to the server."""
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.received.append(body)
        if self.server.silent:
            self.server.over.wait()
            self.close_connection = True
            return
        graphql = self.path == "/graphql"
        answer = json.dumps(self.data(**json.loads(body)) if graphql else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST  # noqa: N815

    def data(self, query, variables=None, **_):
        if "mutation UpsertBucket" in query:  # the start of a run
            self.server.silent = bool(self.server.silence)
            project = {"id": "P", "name": "tpsnet", "entity": {"id": "E", "name": "me"}}
            bucket = {"id": "B", "name": variables["name"], "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": self.server.url} for name in variables["files"]]
            run = {"runID": "B", "uploadHeaders": [], "files": files}
            return {"data": {"createRunFiles": run}}
        return {"data": {}}

    def log_message(self, *_):
        pass
