"""The command `fleetflow desk`."""

from typing import Annotated

import tyro

from fleetflow.types import FleetflowError


def desk(
    port: int = 7860,
    host: str = "127.0.0.1",
    open: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    upload_mb: int = 256,
    frames: int = 240,
    memory: str | None = None,
    threads: int = 0,
) -> None:
    """Look at flow in a browser: a local page, on which all is computed on this machine.

    Nothing is sent anywhere else. Ctrl-C ends it, and what was uploaded is removed.

    Args:
        port: of the page; 0 takes a free one.
        host: who may reach it; anything but this machine needs the token in the address that is printed.
        open: open the page in a browser.
        upload_mb: megabytes a file may have.
        frames: of a clip that are looked at.
        memory: what it may take, such as 4G: large frames are predicted in tiles then. None: no limit.
        threads: 0 takes all.

    Examples:
        fleetflow desk --open
        fleetflow desk --port 8000 --frames 60
    """
    import secrets
    import signal
    import socket
    import webbrowser
    from contextlib import suppress

    from fleetflow.inference.device import use_threads
    from fleetflow.inference.memory import parse_bytes

    try:
        import uvicorn

        from fleetflow.desk.guard import LOOPBACK
        from fleetflow.desk.server import create_app
        from fleetflow.desk.sessions import Limits
    except ImportError as error:
        raise FleetflowError(f'{error.name} is missing; install it with pip install "fleetflow[desk]"') from None
    for name, value, least, most in (
        ("port", port, 0, 65535),
        ("upload-mb", upload_mb, 1, 2**20),
        ("frames", frames, 2, 2**20),
    ):
        if not least <= value <= most:
            raise FleetflowError(f"--{name} is {value}; expected {least} to {most}")
    use_threads(threads)
    host = host.strip("[]")
    loopback = host in (*LOOPBACK, "::1")
    token = None if loopback else secrets.token_urlsafe(16)
    limits = Limits(upload_mb=upload_mb, frames=frames, memory=parse_bytes(memory) if memory else None)
    app = create_app(hosts=LOOPBACK if loopback else None, token=token, limits=limits)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen()  # before the address is told: who comes early waits
        except OSError as error:
            what = "--host" if isinstance(error, socket.gaierror) else "--port"
            raise FleetflowError(f"port {port} of {host}: {error.strerror}; take another with {what}") from None
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"#token={token}" if token else "")
        print(f"fleetflow desk: {address} (Ctrl-C ends it)", flush=True)
        if open:
            webbrowser.open(address)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        hang_up = getattr(signal, "SIGHUP", None)  # the terminal is closed; nohup ignores it; Windows has none
        if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
            signal.signal(hang_up, server.handle_exit)
        with suppress(KeyboardInterrupt):  # uvicorn ends in order, then raises what it was ended by
            server.run(sockets=[listening])
