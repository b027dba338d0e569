"""Modules of torch that layers are compared with."""


def randomized(module):
    """The module with random weights, in inference."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def run(module, x, **kwargs):
    """The outputs of a module: an array, or several."""
    import torch

    with torch.no_grad():
        outputs = module(torch.from_numpy(x), **kwargs)
    if isinstance(outputs, tuple):
        return tuple(y.numpy() for y in outputs if y is not None)
    return outputs.numpy()


def numbers(parameter):
    return parameter.detach().numpy()


def kernel(linear):
    """The weight of a linear module as Keras has it."""
    return numbers(linear.weight).T
