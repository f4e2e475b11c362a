"""The operators of integer models, by name."""

LINEAR = "cnmix.integer_linear.default"
CONVOLUTION = "cnmix.integer_convolution.default"
MATMUL = "cnmix.integer_matmul.default"
FILTER = "cnmix.integer_filter.default"
GROUPED = "cnmix.integer_grouped.default"
RECURRENCE = "cnmix.integer_recurrence.default"

STORED_WEIGHTS = {
    LINEAR: ("weight",),
    CONVOLUTION: ("weight",),
    MATMUL: (),
    FILTER: (),
    GROUPED: ("weight",),
    RECURRENCE: ("w_input", "w_hidden", "w_projection"),
}
"""All of them, with the arguments that may be, or must be, integers of a parameter."""
