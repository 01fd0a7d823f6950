"""`torch.hub.load("OWNER/REPOSITORY", NAME)` finds every backbone and detector of vovnet_zoo here."""

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]


def _entries():
    """Make a function for each backbone and detector of the tables, with a docstring."""
    import timm as _timm

    import vovnet_zoo as _zoo
    from vovnet_zoo import detectors as _detectors
    from vovnet_zoo import ledger as _ledger
    from vovnet_zoo import vovnet as _vovnet

    def weights(name, table):
        """List the tags of the weights of a model, and whether they can be had."""
        tags = {key.split(".", 1)[1]: row for key, row in table.items() if key.split(".")[0] == name}
        return ", ".join(f"{tag} ({_ledger.STATES[row.state]})" for tag, row in tags.items())

    def backbone(name):
        def entry(pretrained=False, **kwargs):
            return _timm.create_model(name, pretrained=pretrained, **kwargs)

        entry.__doc__ = (
            f"{_timm.model_entrypoint(name).__doc__}\n\n"
            "Args:\n"
            "    pretrained (bool): load ImageNet weights; pretrained_cfg=TAG chooses among "
            f"{weights(name, _vovnet.WEIGHTS)}.\n"
            "    kwargs: of timm.create_model, such as num_classes, in_chans, features_only.\n"
        )
        return entry

    def detector(name, backbone_name):
        def entry(pretrained=False, **kwargs):
            return _zoo.create_detector(name, pretrained=pretrained, **kwargs)

        entry.__doc__ = (
            f"FCOS detector (arXiv 1904.01355) on {backbone_name} with a feature pyramid.\n\n"
            "Args:\n"
            f"    pretrained (bool): load trained weights: {weights(name, _detectors.WEIGHTS)}.\n"
            '    kwargs: of vovnet_zoo.create_detector, such as num_classes, variant="published".\n'
        )
        return entry

    def fcos(backbone, **kwargs):
        """FCOS detector (arXiv 1904.01355) on any timm backbone with a feature pyramid.

        Args:
            backbone (str): the name of a timm model, such as "convnext_tiny".
            kwargs: of vovnet_zoo.create_detector, such as num_classes, pretrained_backbone=True.
        """
        return _zoo.create_detector("fcos", backbone=backbone, **kwargs)

    entries = {name: backbone(name) for name in _vovnet.model_cfgs}
    entries |= {name: detector(name, arch["backbone"]) for name, arch in _detectors.DETECTORS.items()}
    entries["fcos"] = fcos
    for name, entry in entries.items():
        entry.__name__ = entry.__qualname__ = name
        entry.__module__ = __name__
    return entries


globals().update(_entries())
