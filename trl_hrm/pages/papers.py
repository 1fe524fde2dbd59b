"""Citation of the HRM paper, for trainers, model cards and dataset cards."""

HRM_PAPER = {
    "title": "Towards Hierarchical Multi-Step Reward Models for Enhanced Reasoning in Large Language Models",
    "id": "2503.13551",
    # docstyle-ignore
    "citation": """\
@article{wang2025hierarchical,
    title        = {{Towards Hierarchical Multi-Step Reward Models for Enhanced Reasoning in Large Language Models}},
    author       = {Wang, Teng and Jiang, Zhangyi and He, Zhenqi and Tong, Shenyang and Yang, Wenhan and Zheng, Yanan and Li, Zeyu and He, Zifan and Gong, Hailei and Ye, Zewen and Ma, Shengjie and Zhang, Jianping},
    year         = 2025,
    journal      = {arXiv preprint arXiv:2503.13551}
}""",
}
