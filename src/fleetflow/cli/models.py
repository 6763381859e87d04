"""The command `fleetflow models`."""

from fleetflow.cli.console import table


def models(json: bool = False) -> None:
    """List the networks: size and cost, whose checkpoints they read, licenses, our weights in the package, papers.

    Args:
        json: as JSON instead of a table.

    Examples:
        fleetflow models
        fleetflow models --json
    """
    from fleetflow.models import catalog

    rows = catalog.rows()
    if json:
        print(catalog.as_json(rows))
        return
    height, width = catalog.SIZE
    cells = [catalog.cells(row) for row in rows]
    costs, names = slice(0, 6), catalog.COLUMNS  # all columns together are too wide for a terminal
    table(f"networks (multiply-adds for frames of {height}x{width})", names[costs], [row[costs] for row in cells])
    sources = [0, 6, 7, 8]
    table("checkpoints they read", [names[k] for k in sources], [[row[k] for k in sources] for row in cells])
