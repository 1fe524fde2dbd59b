"""Citations of papers, for trainers, model cards and dataset cards."""

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

IMPLICIT_PRM_PAPER = {
    "title": "Free Process Rewards without Process Labels",
    "id": "2412.01981",
    # docstyle-ignore
    "citation": """\
@article{yuan2024implicitprm,
    title        = {{Free Process Rewards without Process Labels}},
    author       = {Yuan, Lifan and Li, Wendi and Chen, Huayu and Cui, Ganqu and Ding, Ning and Zhang, Kaiyan and Zhou, Bowen and Liu, Zhiyuan and Peng, Hao},
    year         = 2024,
    journal      = {arXiv preprint arXiv:2412.01981}
}""",
}
