"""A VAE in the style of pytorch/examples/vae, with the sizes and the dynamic binarization of `aevb train`.

Prints a line of JSON an epoch: the test ELBO, one sample of z an image, in nats.
"""

import json

import torch
import torch.nn.functional as F
from shared import arguments, images
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

args = arguments()
torch.manual_seed(args.seed)

train_data, test_data = (TensorDataset(torch.from_numpy(images(args.data, part))) for part in ("train", "t10k"))
train_loader = DataLoader(train_data, batch_size=args.batch_size, shuffle=True)
test_bits = torch.bernoulli(test_data.tensors[0], generator=torch.Generator().manual_seed(args.seed))
test_loader = DataLoader(TensorDataset(test_bits), batch_size=1000)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 500)
        self.fc21 = nn.Linear(500, 20)
        self.fc22 = nn.Linear(500, 20)
        self.fc3 = nn.Linear(20, 500)
        self.fc4 = nn.Linear(500, 784)
        for layer in (self.fc1, self.fc21, self.fc22, self.fc3, self.fc4):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, x):
        h1 = torch.tanh(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        h3 = torch.tanh(self.fc3(z))
        return torch.sigmoid(self.fc4(h3))

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 784))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


model = VAE().to(args.device)
optimizer = optim.Adam(model.parameters(), lr=1e-3)


def loss_function(recon_x, x, mu, logvar):
    BCE = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return BCE + KLD


def train():
    model.train()
    train_loss = 0
    for (data,) in train_loader:
        data = torch.bernoulli(data.to(args.device))
        optimizer.zero_grad()
        recon_batch, mu, logvar = model(data)
        loss = loss_function(recon_batch, data, mu, logvar) / len(data)
        loss.backward()
        train_loss += loss.item()
        optimizer.step()


def test():
    model.eval()
    test_loss = 0
    with torch.no_grad():
        for (data,) in test_loader:
            data = data.to(args.device)
            recon_batch, mu, logvar = model(data)
            test_loss += loss_function(recon_batch, data, mu, logvar).item()
    return -test_loss / len(test_bits)


for epoch in range(1, args.epochs + 1):
    train()
    print(json.dumps({"epoch": epoch, "test_elbo": test()}), flush=True)
