"""A convnet with Accelerate, the gradients of four batches accumulated."""

import torch
from accelerate import Accelerator

from qnewton_mpi.data import datasets
from qnewton_mpi.torch import QuasiNewton

EPOCHS, RATE = 5, 0.01  # AdamW ends at 0.70, 0.49, 0.33, 0.34 with 0.001, 0.003, 0.01, 0.03

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
torch.manual_seed(0)
images, labels = datasets.load(datasets.EMBEDDED, None).train.batch(slice(2048))
train = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels).long())
loader = torch.utils.data.DataLoader(train, 32 // accelerator.num_processes, shuffle=True)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 5, stride=2),
    torch.nn.ReLU(),
    torch.nn.Conv2d(16, 32, 3, stride=2),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 5 * 5, 10),
)
optimizer = QuasiNewton(model.parameters(), samples=32 // accelerator.num_processes, replicas_per_rank=4)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * len(loader) // 4)
optimizer, loader, schedule = accelerator.prepare(optimizer, loader, schedule)

for _ in range(EPOCHS):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step(lambda: torch.nn.functional.cross_entropy(model(inputs), targets))
            schedule.step()
            optimizer.zero_grad()

model.eval()
with torch.no_grad():
    loss = torch.nn.functional.cross_entropy(model(train.tensors[0]), train.tensors[1])
print(f"training loss {loss:.4f}")
