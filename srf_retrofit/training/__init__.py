"""What changes a model: feature schedules, teachers, attention transfer, distillation from logits."""
