"""The experiments of the source documents: ``python -m experiments NAME``.

Each experiment is a module with a dataclass of its options, whose `run` does the work. Its page is
written by the module of the same name in `experiments.pages`, from the results alone.

- `mlp`, `lenet`, `vgg` and `resnet20` train networks by several optimizers and compare them.
  `experiment` and `on_images` have what they share, `contest` the rules of the comparison, `runs`
  the training runs with their progress, `training` the steps, `history` how they went,
  `checkpoints` what survives a kill, and `stored` what a page's numbers hold of finished runs.
- `everyday` and `pinn` do so on several kinds of work at once. They share `pages.kinds`.
- `loss_surface`, `output_paths`, `lecture` and `conjugate_gradient` are small. They run each method
  as one compiled program (`scans`).
- `quickstart` trains one network, `rates` prints tables, `benchmarks` times steps, `paper` takes
  the sources' settings within a time, `parallel` starts several processes, and `index` writes all
  pages again and the overview of them.
"""
