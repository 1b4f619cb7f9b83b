"""A LightningModule with aevb's kernels: `pip install lightning`, then `python examples/lightning_vae.py`."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import aevb
from aevb.data import load


class LitVAE(lightning.LightningModule):
    def __init__(self, data_dim: int, latent_dim: int = 10):
        super().__init__()
        self.vae = aevb.VAE(data_dim, 200, latent_dim)
        self.criterion = aevb.FusedELBO()

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The negative ELBO. The logits are never in memory, and the noise follows `seed_everything`."""
        z, kl = self.criterion.sample(*self.vae.encode(x))
        return self.criterion(self.vae.linear_logits(z), x, kl=kl)

    def training_step(self, batch, batch_index):
        loss = self.loss(batch[0])
        self.log("train_elbo", -loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_index):
        self.log("val_elbo", -self.loss(batch[0]), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(epochs: int = 5) -> None:
    lightning.seed_everything(0)
    digits = load("digits")
    train, test = (
        TensorDataset(images.float() * digits.x_scale) for images in (digits.train_images, digits.test_images)
    )
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(LitVAE(digits.data_dim), DataLoader(train, 100, shuffle=True), DataLoader(test, 300))
    print({name: round(float(value), 2) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
