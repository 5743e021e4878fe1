"""What of a recipe's model becomes int8, without running anything."""

from quantlib.graph.model import plan_of
from quantlib.graph.plan import LayerPlan
from quantlib.models import registry
from quantlib.models.source import ModelInput


def inspect_model(source: ModelInput, num_classes: int, input_shape: tuple[int, int, int]) -> tuple[LayerPlan, ...]:
    """The plan of each layer that has weights, in the order of the model's calls.

    Raises:
        RecipeError, ModelError, MachineError: If there is no such model, or it cannot be quantized.
    """
    model = registry.build(source.architecture, registry.arguments_of(source, num_classes)).eval()
    registry.check_logits(model, num_classes, input_shape)
    return plan_of(model, input_shape).layers
