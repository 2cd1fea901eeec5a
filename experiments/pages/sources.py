"""The documents whose claims the pages check."""

CONSEQUENTIALISM = (
    "N. Paeedeh and K. Ghiasi-Shirazi, *Improving the Backpropagation Algorithm with "
    "Consequentialism Weight Updates over Mini-Batches*"
)
BACK_MATCHING = (
    "H. Zhang, W. Chen and T.-Y. Liu, *Train Feedforward Neural Network with Layer-wise Adaptive "
    "Rate via Approximating Back-matching Propagation*"
)
LECTURE = "C. V. Jawahar, *More on Backpropagation*, CSE 475: Statistical Methods in AI, 2019"
NOTES = "the notes of the NeuronLearning project"
