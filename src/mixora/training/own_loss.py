"""Whether a model divides its own loss by the labels of a whole accumulated step.

transformers' trainer hands `num_items_in_batch` to every model whose forward takes keyword arguments, believes that it
was used, and does not divide the loss by the number of micro-batches. Most models other than causal language models
leave it unread (classifiers, masked language models, T5, BART): their loss would be as many times too large.
"""

import ast
import inspect

from torch import nn


def reads_num_items(model: nn.Module) -> bool:
    """Whether the source of the model's forward hands its keyword arguments, or that one, to what computes its loss.

    True where there is no source to read, as the trainer believes. A wrong False costs nothing but the weights of
    micro-batches: they count alike, however many labels they have.
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
        # a method stays indented, since texts in it may begin at the margin; a lambda may come with half of a line
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return True
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return "num_items_in_batch" in source or any(
        "loss" in ast.unparse(call.func) and any(keyword.arg is None for keyword in call.keywords) for call in calls
    )
