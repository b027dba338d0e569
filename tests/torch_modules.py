"""Modules of torch that layers are compared with."""


def randomized(module):
    """The module with random weights, in inference."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def numbers(parameter):
    return parameter.detach().numpy()


def kernel(linear):
    """The weight of a linear module as Keras has it."""
    return numbers(linear.weight).T
