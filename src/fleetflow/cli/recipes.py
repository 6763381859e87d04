"""The command `fleetflow recipes`."""


def recipes() -> None:
    """List the training recipes: whose schedule each is, and two lines for each of its stages.

    A stage: name, steps, batch x size, learning rate and its schedule, optimizer and weight decay, loss, data sets and
    how their pairs are augmented.

    Examples:
        fleetflow recipes
        fleetflow recipes | grep synthetic
    """
    from fleetflow.training.recipes import RECIPES
    from fleetflow.training.recipes.describe import described
    from fleetflow.training.recipes.finetune import finetune

    for name, plan in RECIPES.items():
        print(f"{name}: {plan.network}; {plan.source}")
        for stage in plan.stages:
            print(f"    {described(stage)}")
    print("finetune: the network of --start, on pairs of your own; as an example, that of fastflownet")
    print(f"    {described(finetune('fastflownet').stages[0])}")
