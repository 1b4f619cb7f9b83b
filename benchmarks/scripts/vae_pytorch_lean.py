"""vae_pytorch.py as somebody would write it who wants speed: logits, fused Adam, batches gathered from one tensor, no
number read from the device within an epoch.

Prints a line of JSON an epoch: the test ELBO, one sample of z an image, in nats.
"""

import json

import torch
import torch.nn.functional as F
from shared import arguments, images
from torch import nn, optim

args = arguments()
torch.manual_seed(args.seed)

train_x, test_x = (torch.from_numpy(images(args.data, part)).to(args.device) for part in ("train", "t10k"))
test_x = torch.bernoulli(test_x)
encoder = nn.Sequential(nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 40)).to(args.device)
decoder = nn.Sequential(nn.Linear(20, 500), nn.Tanh(), nn.Linear(500, 784)).to(args.device)
parameters = [*encoder.parameters(), *decoder.parameters()]
for parameter in parameters:
    nn.init.xavier_uniform_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
optimizer = optim.Adam(parameters, lr=1e-3, fused=True)


def loss_function(x):
    mu, logvar = encoder(x).chunk(2, -1)
    z = torch.addcmul(mu, torch.exp(0.5 * logvar), torch.randn_like(mu))
    nll = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
    return (nll + 0.5 * (mu * mu + torch.exp(logvar) - 1 - logvar).sum()) / len(x)


for epoch in range(1, args.epochs + 1):
    for index in torch.randperm(len(train_x), device=args.device).split(args.batch_size):
        optimizer.zero_grad()
        loss_function(torch.bernoulli(train_x[index])).backward()
        optimizer.step()
    with torch.no_grad():
        elbo = -sum(float(loss_function(x)) * len(x) for x in test_x.split(1000)) / len(test_x)
    print(json.dumps({"epoch": epoch, "test_elbo": elbo}), flush=True)
