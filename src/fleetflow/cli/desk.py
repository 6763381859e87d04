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
        threads: 0 takes all.

    Examples:
        fleetflow desk --open
        fleetflow desk --port 8000 --frames 60
    """
    import secrets
    import socket
    import webbrowser

    from fleetflow.inference.device import use_threads

    try:
        import uvicorn

        from fleetflow.desk.server import LOOPBACK, create_app
        from fleetflow.desk.sessions import Limits
    except ImportError as error:
        raise FleetflowError(f'{error.name} is missing; install it with pip install "fleetflow[desk]"') from None
    use_threads(threads)
    loopback = host in (*LOOPBACK, "::1")
    token = None if loopback else secrets.token_urlsafe(16)
    app = create_app(
        hosts=LOOPBACK if loopback else None, token=token, limits=Limits(upload_mb=upload_mb, frames=frames)
    )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host.strip("[]"), port))
        except OSError as error:
            raise FleetflowError(f"port {port} of {host}: {error.strerror}; take another with --port") from None
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"#token={token}" if token else "")
        print(f"fleetflow desk: {address} (Ctrl-C ends it)", flush=True)
        if open:
            webbrowser.open(address)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[listening])
